"""The sum over the programs of pass 2, in a fixed order, into the running sums."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # entries of a running sum one program adds to


@triton.jit
def _add(p_sum, p_partial, partials, stride_partial, o_n, N, weight):
    """``sum[n] += weight · Σ_p partial[p, n]``."""
    m_n = o_n < N
    b = tl.zeros([o_n.shape[0]], tl.float32)
    for i in range(0, partials):
        b += tl.load(p_partial + i * stride_partial.to(tl.int64) + o_n, mask=m_n, other=0.0)
    tl.store(p_sum + o_n, tl.load(p_sum + o_n, mask=m_n, other=0.0) + weight * b, mask=m_n)


@triton.jit(do_not_specialize=["H", "Q", "K", "R", "key_groups", "query_splits", "g2r_splits", "stride_partial"])
def accumulate_kernel(
    p_r2g,  # [B, H, Q] running sums
    p_g2r,  # [B, H, K]
    p_mass,  # [B, H, Q] or None
    p_sram,  # [B, H, R, K] or None
    p_r2g_partial,  # [B·H, key groups, Q]
    p_g2r_partial,  # [B·H, splits, K], of pass 1 or pass 2
    p_mass_partial,  # [B·H, key groups, Q] or None
    p_sram_partial,  # [B·H, query splits, R, K] or None
    H,
    Q,
    K,
    R,
    key_groups,
    query_splits,
    g2r_splits,
    stride_partial,
    stride_rb,
    stride_rh,
    stride_gb,
    stride_gh,
    stride_mb,
    stride_mh,
    stride_sb,
    stride_sh,
    stride_sr,
    BLOCK: tl.constexpr,
):
    """``r2g += Σ_groups / K``, ``g2r += Σ_splits / Q``, ``mass += Σ_groups``, ``sram += Σ_splits``.

    Grid: (B·H, query blocks + key blocks · (1 + R)).
    """
    i_bh, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    query_blocks, key_blocks = tl.cdiv(Q, BLOCK), tl.cdiv(K, BLOCK)
    o_block = tl.arange(0, BLOCK)
    if i_n < query_blocks:
        o_n = i_n * BLOCK + o_block
        o_slot = i_bh * key_groups * Q
        _add(p_r2g + i_b * stride_rb + i_h * stride_rh, p_r2g_partial + o_slot, key_groups, Q, o_n, Q, 1.0 / K)
        if p_mass is not None:
            _add(p_mass + i_b * stride_mb + i_h * stride_mh, p_mass_partial + o_slot, key_groups, Q, o_n, Q, 1.0)
    elif i_n < query_blocks + key_blocks:
        o_n = (i_n - query_blocks) * BLOCK + o_block
        p_partial = p_g2r_partial + i_bh * g2r_splits * stride_partial
        _add(p_g2r + i_b * stride_gb + i_h * stride_gh, p_partial, g2r_splits, stride_partial, o_n, K, 1.0 / Q)
    else:
        if p_sram is not None:
            i_r = (i_n - query_blocks - key_blocks) // key_blocks
            o_n = (i_n - query_blocks - key_blocks) % key_blocks * BLOCK + o_block
            p_sum = p_sram + i_b * stride_sb + i_h * stride_sh + i_r.to(tl.int64) * stride_sr
            o_slot = (i_bh * query_splits * R + i_r) * K
            _add(p_sum, p_sram_partial + o_slot, query_splits, R.to(tl.int64) * K, o_n, K, 1.0)


def accumulate(
    r2g: Tensor,
    g2r: Tensor,
    mass: Tensor | None,
    sram: Tensor | None,
    partials: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> None:
    """Adds the partials of one reference to its running sums ``[B, H, …]``."""
    B, H, Q = r2g.shape
    K, R = g2r.shape[2], 0 if sram is None else sram.shape[2]
    grid = B * H, triton.cdiv(Q, BLOCK) + triton.cdiv(K, BLOCK) * (1 + R)
    accumulate_kernel[grid](
        r2g,
        g2r,
        mass,
        sram,
        *partials,
        H,
        Q,
        K,
        R,
        partials[0].shape[1],
        0 if partials[3] is None else partials[3].shape[1],
        partials[1].shape[1],
        partials[1].stride(1),
        *r2g.stride()[:2],
        *g2r.stride()[:2],
        *((0, 0) if mass is None else mass.stride()[:2]),
        *((0, 0, 0) if sram is None else sram.stride()[:3]),
        BLOCK=BLOCK,
    )
