"""Add the partials of pass 2's programs, in a fixed order, to the running sums."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from i2am.kernels.tiles import Call, Configuration, Tiles, configuration

BLOCK = 512  # entries of a running sum one program adds to
TILES = Tiles(1, BLOCK, 4, 3)


@triton.jit
def add(total, partial, partials, stride, o_n, N, weight):
    """Add ``weight · Σ_p partial[p, n]`` to ``total[n]``."""
    m_n = o_n < N
    b = tl.zeros([o_n.shape[0]], tl.float32)
    for i in range(0, partials):
        b += tl.load(partial + i * stride.to(tl.int64) + o_n, mask=m_n, other=0.0)
    tl.store(total + o_n, tl.load(total + o_n, mask=m_n, other=0.0) + weight * b, mask=m_n)


STRIDES = ["r2g_strides", "g2r_strides", "mass_strides", "sram_strides"]


@triton.jit(do_not_specialize=[*STRIDES, "sizes", "counts"])
def accumulate_kernel(
    r2g, r2g_strides,          # [B, H, Q] running sums; strides of B and H
    g2r, g2r_strides,          # [B, H, K]
    mass, mass_strides,        # [B, H, Q] or None
    sram, sram_strides,        # [B, H, R, K] or None; strides of B, H and R
    r2g_partial,               # [B·H, key groups, Q]
    g2r_partial,               # [B·H, query splits, K]
    mass_partial,              # [B·H, key groups, Q] or None
    sram_partial,              # [B·H, query splits, R, K] or None
    sizes,                     # (H, Q, K, R)
    counts,                    # of key groups and query splits
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add ``r2g += Σ_groups / K``, ``g2r += Σ_splits / Q``, ``mass += Σ_groups``, ``sram += Σ_splits``.

    Grid: (B·H, query blocks + key blocks · (1 + R)).
    """
    i_bh, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    H, Q, K, R = sizes[0], sizes[1], sizes[2], sizes[3]
    i_b, i_h = i_bh // H, i_bh % H
    query_blocks, key_blocks = tl.cdiv(Q, BLOCK), tl.cdiv(K, BLOCK)
    o_block = tl.arange(0, BLOCK)
    if i_n < query_blocks:
        o_n = i_n * BLOCK + o_block
        o_slot = i_bh * counts[0] * Q
        add(r2g + i_b * r2g_strides[0] + i_h * r2g_strides[1], r2g_partial + o_slot, counts[0], Q, o_n, Q, 1.0 / K)
        if mass is not None:
            add(mass + i_b * mass_strides[0] + i_h * mass_strides[1], mass_partial + o_slot, counts[0], Q, o_n, Q, 1.0)
    elif i_n < query_blocks + key_blocks:
        o_n = (i_n - query_blocks) * BLOCK + o_block
        p = g2r_partial + i_bh * counts[1] * K
        add(g2r + i_b * g2r_strides[0] + i_h * g2r_strides[1], p, counts[1], K, o_n, K, 1.0 / Q)
    else:
        if sram is not None:
            i_r = (i_n - query_blocks - key_blocks) // key_blocks
            o_n = (i_n - query_blocks - key_blocks) % key_blocks * BLOCK + o_block
            total = sram + i_b * sram_strides[0] + i_h * sram_strides[1] + i_r.to(tl.int64) * sram_strides[2]
            o_slot = (i_bh * counts[1] * R + i_r) * K
            add(total, sram_partial + o_slot, counts[1], R.to(tl.int64) * K, o_n, K, 1.0)


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for, with and without mass and SRAM."""
    names = ("r2g", "g2r", "r2g_partial", "g2r_partial")
    if call.mass or call.regions:
        names += ("mass", "sram", "mass_partial", "sram_partial")
    elif call != Call(call.device, call.dtype, call.d):
        return
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("r2g_strides", "g2r_strides", "mass_strides"), ("i32",) * 2)
    types |= {"sram_strides": ("i32",) * 3, "sizes": ("i32",) * 4, "counts": ("i32",) * 2}
    yield configuration("accumulate", accumulate_kernel, types, {"BLOCK": BLOCK}, TILES)
