"""Pass 1, a flash forward that also leaves the column log-sum-exp, and the launcher of both passes.

Where all keys fit one tile, a row's normaliser is known at once, and pass 1 leaves G2R as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels.attribution import attribute
from i2am.kernels.columns import Columns, normalise
from i2am.kernels.configuration import (
    MAX_REGIONS,
    Device,
    attention_constants,
    attention_tiles,
    attribution_tiles,
    mask_kind,
    mask_strides,
    per_program,
    programs,
    upcast,
)
from i2am.kernels.reduce import accumulate
from i2am.kernels.tile import DEAD, LN2, LOG2E, dot, load_rows, nearest, power_of_two, scores, store_rows

HEADROOM = tl.constexpr(32.0)  # how far above the pivot a row's maximum may lie, log2; TINY in columns.py builds on it


@triton.jit(
    do_not_specialize=["H", "Nq", "Nk", "query_start", "query_stop", "key_start", "key_stop", "tiles_per_split"]
)
def attention_kernel(
    p_q,  # [B, H, Nq, D]
    p_k,  # [B, H, Nk, D]
    p_v,  # [B, H, Nk, D] or None
    p_mask,  # [B, H, Nq, Nk] bool, additive or None
    p_out,  # [B, H, Nq, D] or None
    p_row,  # [B, H, Nq] natural log-sum-exp of the rows
    p_sum,  # [B·H, splits, whole key tiles] column sums over a split's queries, in units of 2^pivot; starts at 0
    p_pivot,  # [B·H, splits]; None, as p_sum, for attention alone
    p_g2r,  # [B·H, splits, BN] partial Σ_i P_ij over a split's queries where all keys fit one tile, else None
    scale,
    H,
    Nq,
    Nk,
    query_start,
    query_stop,
    key_start,
    key_stop,
    tiles_per_split,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_ob,
    stride_oh,
    stride_on,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN_N: tl.constexpr,
    ROW_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``O = softmax(S) V``, ``row_i = log Σ_j exp(S_ij)``, and ``sum_j = Σ_i exp2(s_ij - pivot)`` over the split's i.

    With ``p_g2r`` also ``Σ_i P_ij``, as long as the keys are one tile.

    ``s = S · log2(e)``. The column sums reuse the exponentials of the row softmax, ``p_ij = exp2(s_ij - m_i)`` with the
    running row maximum ``m_i``: ``sum_j = Σ_i p_ij · exp2(m_i - pivot)``. A sum that lost something that way is too
    small or not a number: :mod:`i2am.kernels.columns` sees that and takes the exponentials afresh.

    Grid: (B·H, splits); ``scale`` includes log2(e). A program walks the query tiles of its split, and owns one slot of
    ``p_sum`` and ``p_pivot``.
    """
    i_bh, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    if p_v is not None:
        p_v += i_b * stride_vb + i_h * stride_vh
        p_out += i_b * stride_ob + i_h * stride_oh
    if p_mask is not None:
        p_mask += i_b * stride_mb + i_h * stride_mh
    p_row += i_bh * Nq
    i_slot = i_bh * tl.num_programs(1) + i_split
    key_first = key_start // BN * BN  # the sums are kept in whole tiles: aligned, and without a mask
    if p_sum is not None:
        p_sum += i_slot * tl.cdiv(key_stop - key_first, BN) * BN
    if p_g2r is not None:
        b_g = tl.zeros([BN], tl.float32)

    pivot = float("-inf")
    first = i_split * tiles_per_split
    for i_m in range(first, min(first + tiles_per_split, tl.cdiv(Nq, BM))):
        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        m_generated = (o_m >= query_start) & (o_m < query_stop)  # [BM]
        generated = (i_m * BM < query_stop) & (i_m * BM + BM > query_start)
        b_q = load_rows(p_q, o_m, Nq, stride_qn, 0, D_MAIN, D)  # [BM, D_MAIN]
        b_m = tl.full([BM], float("-inf"), tl.float32)  # running row maximum
        b_l = tl.zeros([BM], tl.float32)  # running row sum
        b_qt = b_q
        if D_TAIL > 0:
            b_qt = load_rows(p_q, o_m, Nq, stride_qn, D_MAIN, D_TAIL, D)  # [BM, D_TAIL]
        if p_v is not None:
            b_o = tl.zeros([BM, D_MAIN], tl.float32)
            if D_TAIL > 0:
                b_ot = tl.zeros([BM, D_TAIL], tl.float32)

        tl.debug_barrier()  # the columns read below were written by other threads for the previous query tile
        for i_n in range(0, Nk, BN):
            o_n = i_n + tl.arange(0, BN)  # [BN]
            b_x, factor = scores(
                b_q,
                b_qt,
                p_k,
                p_mask,
                o_m,
                o_n,
                scale,
                Nq,
                Nk,
                stride_kn,
                stride_mm,
                stride_mn,
                D,
                D_MAIN,
                D_TAIL,
                EVEN_N,
                ROW_MASK,
                UPCAST,
            )

            # A rounded maximum does as well, and factors between two of them are powers of two: exact, and cheap.
            b_top = tl.maximum(b_m, nearest(tl.max(b_x, 1) * factor))
            b_finite = tl.where(b_top == float("-inf"), 0.0, b_top)  # all masked so far: -inf - -inf is not a number
            b_p = tl.exp2(b_x * factor - b_finite[:, None])  # [BM, BN]
            b_rescale = power_of_two(b_m - b_finite)
            b_l = b_l * b_rescale + tl.sum(b_p, 1)
            b_m = b_top

            if p_sum is not None:  # noqa: SIM102 (the compiler's question, apart from the program's)
                if generated & (i_n < key_stop) & (i_n >= key_first):
                    m_counts = m_generated & (b_m > float("-inf"))
                    if pivot == float("-inf"):
                        pivot = tl.max(tl.where(m_counts, b_m, float("-inf")), 0)
                    # One row too far up spoils every column, rather than a test of its own in every tile.
                    b_u = tl.where(b_m - pivot <= HEADROOM, power_of_two(b_m - pivot), float("nan"))
                    b_u = tl.where(m_counts, b_u, 0.0)  # [BM]
                    p_slot = p_sum + (o_n - key_first)
                    tl.store(p_slot, tl.load(p_slot) + tl.sum(b_p * b_u[:, None], 0))
                    if p_g2r is not None:
                        b_share = tl.where(m_generated & (b_m > DEAD), 1.0 / b_l, 0.0)  # [BM]
                        b_g += tl.sum(b_p * b_share[:, None], 0)

            if p_v is not None:
                b_v = load_rows(p_v, o_n, Nk, stride_vn, 0, D_MAIN, D)  # [BN, D_MAIN]
                b_o = dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None], UPCAST)
                if D_TAIL > 0:
                    b_vt = load_rows(p_v, o_n, Nk, stride_vn, D_MAIN, D_TAIL, D)
                    b_ot = dot(b_p.to(b_v.dtype), b_vt, b_ot * b_rescale[:, None], UPCAST)

        tl.store(p_row + o_m, (b_m + tl.log2(b_l)) * LN2, mask=o_m < Nq)
        if p_v is not None:
            b_inverse = 1.0 / tl.where(b_l == 0.0, 1.0, b_l)  # [BM]
            store_rows(p_out, b_o * b_inverse[:, None], o_m, Nq, stride_on, 0, D_MAIN, D)
            if D_TAIL > 0:
                store_rows(p_out, b_ot * b_inverse[:, None], o_m, Nq, stride_on, D_MAIN, D_TAIL, D)

    if p_sum is not None:
        tl.store(p_pivot + i_slot, pivot)
    if p_g2r is not None:
        tl.store(p_g2r + i_slot * BN + tl.arange(0, BN), b_g)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> tuple[Tensor, Tensor, Columns, Tensor | None]:
    """Pass 1: ``out [B, H, Nq, D]``, natural ``row [B, H, Nq]``, the column sums and partial G2R ``[B·H, splits, K]``.

    ``scale`` includes log2(e), ``keys`` is the hull of the references; there is no G2R where the keys take several
    tiles. ``out`` lies in memory as ``[B, Nq, H, D]``, so
    that the transpose and reshape that follow in a model cost nothing; empty without ``v``.
    """
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    out = q.new_empty(0) if v is None else q.new_empty(B, Nq, H, D).transpose(1, 2)
    row = q.new_empty(B, H, Nq, dtype=torch.float32)
    tiles = attention_tiles(D, q.element_size(), Device.of(q.device), mask_kind(mask), Nk)
    query_tiles = triton.cdiv(Nq, tiles.m)
    key_first = keys[0] // tiles.n * tiles.n
    columns = triton.cdiv(keys[1] - key_first, tiles.n) * tiles.n
    tiles_per_split = per_program(query_tiles, B * H, programs(q.device), slot=4 * B * H * columns)
    splits = triton.cdiv(query_tiles, tiles_per_split)
    sums = torch.zeros(B * H, splits, columns, dtype=torch.float32, device=q.device)
    pivots = sums.new_empty(B * H, splits)
    g2r = sums.new_empty(B * H, splits, tiles.n) if Nk <= tiles.n else None
    attention_kernel[B * H, splits](
        q,
        k,
        v,
        mask,
        None if v is None else out,
        row,
        sums,
        pivots,
        g2r,
        scale,
        H,
        Nq,
        Nk,
        *queries,
        *keys,
        tiles_per_split,
        *q.stride()[:3],
        *k.stride()[:3],
        *((0, 0, 0) if v is None else v.stride()[:3]),
        *mask_strides(mask),
        *((0, 0, 0) if v is None else out.stride()[:3]),
        **attention_constants(D, Nk, tiles, mask_kind(mask), upcast(q.dtype)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    columns = Columns(sums[..., keys[0] - key_first :], pivots, tiles_per_split * tiles.m)
    return out, row, columns, None if g2r is None else g2r[..., keys[0] : keys[1]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: tuple[int, int],
    keys: list[tuple[int, int]],
    r2g: list[Tensor],
    g2r: list[Tensor],
    mass: list[Tensor],
    sram: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One attention call; adds to the running sums of every reference. See :func:`i2am.ops.accumulate`.

    ``mask`` is expanded to ``[B, H, Nq, Nk]``, ``regions`` is ``[1 | B, R, Q]`` with weights that sum to 1; spans are
    ``[start, stop)``. ``col_lse`` covers the hull of ``keys``.
    """
    if regions is not None and regions.shape[1] > MAX_REGIONS:
        raise ValueError(f"at most {MAX_REGIONS} regions at a time, got {regions.shape[1]}")
    if scale < 0:
        q, scale = -q, -scale  # the kernels take the maximum before they scale
    scale = max(scale, 1e-30) * LOG2E.value  # a masked score stays -inf even when the scale is 0
    start, stop = min(a for a, _ in keys), max(b for _, b in keys)
    with torch.cuda.device_of(q):
        out, row, columns, spent = forward(q, k, v, scale=scale, mask=mask, queries=queries, keys=(start, stop))
        R = 0 if regions is None else regions.shape[1]
        tiles = attribution_tiles(q.shape[-1], q.element_size(), Device.of(q.device), mask_kind(mask), R)
        col, peak = normalise(
            q, k, columns, row, scale=scale, mask=mask, queries=queries, keys=(start, stop), tiles=tiles
        )
        del columns  # its memory serves the partials
        for i, (a, b) in enumerate(keys):
            partials = attribute(
                q,
                k,
                scale=scale,
                mask=mask,
                regions=regions,
                queries=queries,
                keys=(a, b),
                row=row,
                col=col[..., a - start : b - start],
                peak=peak,
                tiles=tiles,
                g2r=None if spent is None else spent[..., a - start : b - start],
                mass=bool(mass),
            )
            accumulate(r2g[i], g2r[i], mass[i] if mass else None, sram[i] if sram else None, partials)
    return out, row, col
