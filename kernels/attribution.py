"""Pass 2: with both normalisers known, ``Q K^T`` once more gives R2G, G2R, mass and SRAM, from one exponential."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels.configuration import (
    Device,
    Tiles,
    attribution_constants,
    mask_kind,
    mask_strides,
    per_program,
    programs,
    upcast,
)
from i2am.kernels.tile import DEAD, LOG2E, dot, load_rows, mask_scores

REACH = tl.constexpr(64.0)  # how far above a column's log2-sum a row's may lie before their ratio needs an exponential


@triton.jit(
    do_not_specialize=[
        "H",
        "Nq",
        "Nk",
        "query_start",
        "query_stop",
        "key_start",
        "key_stop",
        "tiles_per_group",
        "tiles_per_split",
        "R",
    ]
)
def attribution_kernel(
    p_q,  # [B, H, Nq, D]
    p_k,  # [B, H, Nk, D]
    p_mask,  # [B, H, Nq, Nk] bool, additive or None
    p_row,  # [B, H, Nq] natural log-sum-exp of the rows
    p_col,  # [B, H, K] natural log-sum-exp of this reference's columns
    p_peak,  # [B·H, query tiles] log2, largest row log-sum-exp of a query tile
    p_regions,  # [1 | B, R, Q] or None
    p_r2g,  # [B·H, key groups, Q] partial Σ_j C_ij
    p_g2r,  # [B·H, query splits, K] partial Σ_i P_ij, or None where pass 1 has it already
    p_mass,  # [B·H, key groups, Q] partial Σ_j P_ij, or None
    p_sram,  # [B·H, query splits, R, K] partial Σ_i w_ri P_ij, or None
    scale,
    H,
    Nq,
    Nk,
    query_start,
    query_stop,
    key_start,
    key_stop,
    tiles_per_group,
    tiles_per_split,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_colbh,
    stride_wb,
    stride_wr,
    stride_wq,
    R,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    EVEN_N: tl.constexpr,
    ROW_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``P_ij = exp2(s_ij - row_i)``, summed over i, and ``C_ij = P_ij · 2^row_i / 2^col_j``, summed over j.

    The ratio is split at ``c = min_j col_j`` into ``exp2(row_i - c) · exp2(c - col_j)``, two vectors; a tile whose rows
    reach too far above ``c`` (P would underflow where C does not) takes ``exp2(s_ij - col_j)`` instead.

    Grid: (B·H, key groups, query splits); ``scale`` includes log2(e). A key tile stays while the split's query tiles
    pass by; each program owns one slot of every partial.
    """
    i_bh, i_group, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_b, i_h = i_bh // H, i_bh % H
    Q, K = query_stop - query_start, key_stop - key_start
    query_tiles = tl.cdiv(Q, BM)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    if p_mask is not None:
        p_mask += i_b * stride_mb + i_h * stride_mh
    p_row += i_bh * Nq
    p_col += i_bh * stride_colbh
    p_peak += i_bh * query_tiles
    o_row_slot = (i_bh * tl.num_programs(1) + i_group) * Q
    i_col_slot = i_bh * tl.num_programs(2) + i_split
    p_r2g += o_row_slot
    if p_g2r is not None:
        p_g2r += i_col_slot * K
    if p_mass is not None:
        p_mass += o_row_slot
    if p_sram is not None:
        p_regions += i_b * stride_wb
        p_sram += i_col_slot * R * K
        o_r = tl.arange(0, BR).to(tl.int64)

    first_n, first_m = i_group * tiles_per_group, i_split * tiles_per_split
    for i_n in range(first_n, min(first_n + tiles_per_group, tl.cdiv(K, BN))):
        o_j = i_n * BN + tl.arange(0, BN)  # [BN] among the reference keys
        m_n = o_j < K
        o_n = tl.minimum(key_start + o_j, Nk - 1)  # past the end the last key again: a zero's P could be infinite
        b_k = load_rows(p_k, o_n, Nk, stride_kn, 0, D_MAIN, D)  # [BN, D_MAIN]
        if D_TAIL > 0:
            b_kt = load_rows(p_k, o_n, Nk, stride_kn, D_MAIN, D_TAIL, D)  # [BN, D_TAIL]
        b_col = tl.load(p_col + o_j, mask=m_n, other=float("-inf")) * LOG2E  # [BN]
        b_col = tl.where(b_col > DEAD, b_col, float("inf"))  # nothing is divided by the sum of a masked column
        c = tl.min(b_col, 0)
        b_cf = tl.where(b_col == float("inf"), 0.0, tl.exp2(c - b_col))  # [BN]
        if p_g2r is not None:
            b_g = tl.zeros([BM // 16, 8, BN], tl.float32)  # partial over rows
        if p_sram is not None:
            b_z = tl.zeros([BR, BN], tl.float32)

        tl.debug_barrier()  # the row partials read below were written by other threads for the previous key tile
        for i_m in range(first_m, min(first_m + tiles_per_split, query_tiles)):
            o_i = i_m * BM + tl.arange(0, BM)  # [BM] among the generated queries
            m_m = o_i < Q
            o_m = query_start + o_i
            b_q = load_rows(p_q, o_m, Nq, stride_qn, 0, D_MAIN, D)  # [BM, D_MAIN]
            b_s = dot(b_q, tl.trans(b_k), None, UPCAST)  # [BM, BN]
            if D_TAIL > 0:
                b_qt = load_rows(p_q, o_m, Nq, stride_qn, D_MAIN, D_TAIL, D)
                b_s = dot(b_qt, tl.trans(b_kt), b_s, UPCAST)
            b_x, factor = mask_scores(b_s, scale, p_mask, o_m, o_n, Nq, Nk, stride_mm, stride_mn, True, ROW_MASK)

            near = tl.load(p_peak + i_m) - c <= REACH
            b_r = tl.zeros([BM], tl.float32)
            if not near:  # loads the columns' sums again, so that the usual path need not keep them in registers
                b_far = tl.load(p_col + o_j, mask=m_n, other=float("-inf")) * LOG2E  # [BN]
                b_far = tl.where(b_far > DEAD, b_far, float("inf"))
                b_r = tl.sum(tl.exp2(b_x * factor - b_far[None, :]), 1)

            b_row = tl.load(p_row + o_m, mask=m_m, other=float("-inf")) * LOG2E  # [BM]
            m_live = b_row > DEAD
            b_row = tl.where(m_live, b_row, float("inf"))
            b_p = tl.exp2(b_x * factor - b_row[:, None])  # [BM, BN]
            b_rf = tl.where(m_live, tl.exp2(b_row - c), 0.0)  # [BM]
            b_r = tl.where(near, b_rf * tl.sum(b_p * b_cf[None, :], 1), b_r)
            m_later = m_m & (i_n > first_n)
            tl.store(p_r2g + o_i, b_r + tl.load(p_r2g + o_i, mask=m_later, other=0.0), mask=m_m)
            if p_mass is not None:
                b_mass = tl.sum(b_p if EVEN_N else tl.where(m_n[None, :], b_p, 0.0), 1)
                tl.store(p_mass + o_i, b_mass + tl.load(p_mass + o_i, mask=m_later, other=0.0), mask=m_m)

            if p_g2r is not None:
                # In the layout of the product a thread holds two rows of each 16, so this sum stays within the thread,
                # and no thread waits for another before the loop is over.
                b_g += tl.sum(tl.reshape(b_p, [BM // 16, 2, 8, BN]), 1)
            if p_sram is not None:
                p_w = p_regions + o_r[:, None] * stride_wr + o_i[None, :] * stride_wq
                b_w = tl.load(p_w, mask=(o_r < R)[:, None] & m_m[None, :], other=0.0)  # [BR, BM]
                b_z = tl.dot(b_w, b_p, b_z, input_precision=PRECISION)  # [BR, BM] @ [BM, BN]

        if p_g2r is not None:
            tl.store(p_g2r + o_j, tl.sum(tl.reshape(b_g, [BM // 2, BN]), 0), mask=m_n)
        if p_sram is not None:
            tl.store(p_sram + o_r[:, None] * K + o_j[None, :], b_z, mask=(o_r < R)[:, None] & m_n[None, :])


def attribute(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
    row: Tensor,
    col: Tensor,
    peak: Tensor,
    tiles: Tiles,
    g2r: Tensor | None,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Partials of one reference: R2G ``[B·H, groups, Q]``, G2R ``[B·H, splits, K]``, mass as R2G, SRAM ``[…, R, K]``.

    ``scale`` includes log2(e); ``row`` and ``col`` are natural log-sum-exps, ``col`` a view into the hull's. ``g2r``:
    its partials, where pass 1 left them.
    """
    B, H, Nq, D = q.shape
    Q, K = queries[1] - queries[0], keys[1] - keys[0]
    R = 0 if regions is None else regions.shape[1]
    tiles = tiles.fit(K)
    key_tiles, query_tiles = triton.cdiv(K, tiles.n), triton.cdiv(Q, tiles.m)
    at_once = programs(q.device)
    tiles_per_group = per_program(key_tiles, B * H, at_once, slot=4 * B * H * Q * (1 + mass))
    groups = triton.cdiv(key_tiles, tiles_per_group)
    tiles_per_split = per_program(query_tiles, B * H * groups, at_once, slot=4 * B * H * K * (1 + R))
    splits = triton.cdiv(query_tiles, tiles_per_split)

    def partial(*shape: int) -> Tensor:
        return torch.empty(B * H, *shape, dtype=torch.float32, device=q.device)

    r2g = partial(groups, Q)
    g2r_here = partial(splits, K) if g2r is None else None
    masses, srams = partial(groups, Q) if mass else None, partial(splits, R, K) if R else None
    attribution_kernel[B * H, groups, splits](
        q,
        k,
        mask,
        row,
        col,
        peak,
        regions,
        r2g,
        g2r_here,
        masses,
        srams,
        scale,
        H,
        Nq,
        k.shape[2],
        *queries,
        *keys,
        tiles_per_group,
        tiles_per_split,
        *q.stride()[:3],
        *k.stride()[:3],
        *mask_strides(mask),
        col.stride(1),
        *((0, 0, 0) if regions is None else (regions.stride(0) * (regions.shape[0] > 1), *regions.stride()[1:])),
        R,
        **attribution_constants(D, K, R, tiles, Device.of(q.device), mask_kind(mask), upcast(q.dtype)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return r2g, g2r if g2r_here is None else g2r_here, masses, srams
