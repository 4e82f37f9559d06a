"""Between the passes: the column log-sum-exp from the sums that pass 1's programs left, taken afresh where need be."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels.configuration import (
    Tiles,
    columns_tiles,
    mask_kind,
    mask_strides,
    tile_constants,
    upcast,
)
from i2am.kernels.tile import LN2, LOG2E, load_rows, log2_add, scores

# Pass 1 multiplies exponentials of at least 2^-126 (smaller ones are zero) by at most 2^HEADROOM = 2^32: a column lost
# less than 2^-94 a query, which float32 would not have seen beside a sum of this size for up to 2^14 queries a split.
TINY = tl.constexpr(2.0**-56)


@triton.jit(
    do_not_specialize=[
        "H",
        "Nq",
        "Nk",
        "query_start",
        "query_stop",
        "key_start",
        "key_stop",
        "splits",
        "queries_per_split",
        "stride_sum",
    ]
)
def columns_kernel(
    p_q,  # [B, H, Nq, D]
    p_k,  # [B, H, Nk, D]
    p_mask,  # [B, H, Nq, Nk] bool, additive or None
    p_sum,  # [B·H, splits, K] column sums in units of 2^pivot, from pass 1
    p_pivot,  # [B·H, splits]
    p_row,  # [B·H, Nq] natural log-sum-exp of the rows
    p_col,  # [B·H, K] natural log-sum-exp of the columns
    p_peak,  # [B·H, query tiles] log2, largest row log-sum-exp of a query tile
    scale,
    H,
    Nq,
    Nk,
    query_start,
    query_stop,
    key_start,
    key_stop,
    splits,
    queries_per_split,
    stride_sum,
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
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROW_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``col_j = log Σ_splits 2^pivot · sum_j``, and pass 2's ``peak = max_i row_i`` over each of its query tiles.

    Grid: (B·H, key tiles + query tiles); ``scale`` includes log2(e).
    """
    i_bh, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    K = key_stop - key_start
    key_tiles = tl.cdiv(K, BN)
    if i_n >= key_tiles:
        i_m = i_n - key_tiles
        o_m = query_start + i_m * BM + tl.arange(0, BM)
        b_row = tl.load(p_row + i_bh * Nq + o_m, mask=o_m < query_stop, other=float("-inf"))
        query_tiles = tl.cdiv(query_stop - query_start, BM)
        tl.store(p_peak + i_bh * query_tiles + i_m, tl.max(b_row, 0) * LOG2E)
    else:
        o_j = i_n * BN + tl.arange(0, BN)  # [BN]
        m_n = o_j < K
        p_sum += i_bh * splits * stride_sum
        p_pivot += i_bh * splits
        first_split, last_split = query_start // queries_per_split, tl.cdiv(query_stop, queries_per_split)
        b_col = tl.full([BN], float("-inf"), tl.float32)
        b_sound = tl.full([BN], 1, tl.int32)
        for i_split in range(first_split, last_split):
            b_sum = tl.load(p_sum + i_split * stride_sum.to(tl.int64) + o_j, mask=m_n, other=1.0)
            b_sound = tl.where(b_sum >= TINY, b_sound, 0)
            b_col = log2_add(b_col, tl.load(p_pivot + i_split) + tl.log2(b_sum))

        if tl.min(b_sound, 0) == 0:
            i_b, i_h = i_bh // H, i_bh % H
            p_q += i_b * stride_qb + i_h * stride_qh
            p_k += i_b * stride_kb + i_h * stride_kh
            if p_mask is not None:
                p_mask += i_b * stride_mb + i_h * stride_mh
            o_n = key_start + o_j
            b_col = tl.full([BN], float("-inf"), tl.float32)
            for i_split in range(first_split, last_split):
                b_sum = tl.load(p_sum + i_split * stride_sum.to(tl.int64) + o_j, mask=m_n, other=1.0)
                if tl.min((b_sum >= TINY).to(tl.int32), 0) == 1:
                    b_col = log2_add(b_col, tl.load(p_pivot + i_split) + tl.log2(b_sum))
                else:
                    first = max(i_split * queries_per_split, query_start)
                    last = min((i_split + 1) * queries_per_split, query_stop)
                    for i_m in range(first, last, BM):
                        o_m = i_m + tl.arange(0, BM)  # [BM]
                        b_q = load_rows(p_q, o_m, Nq, stride_qn, 0, D_MAIN, D)  # [BM, D_MAIN]
                        b_qt = b_q
                        if D_TAIL > 0:
                            b_qt = load_rows(p_q, o_m, Nq, stride_qn, D_MAIN, D_TAIL, D)  # [BM, D_TAIL]
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
                            True,
                            ROW_MASK,
                            UPCAST,
                        )
                        b_x = tl.where((o_m < last)[:, None], b_x, float("-inf"))  # [BM, BN]
                        b_top = tl.max(b_x, 0) * factor  # [BN]
                        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
                        b_part = tl.sum(tl.exp2(b_x * factor - b_top[None, :]), 0)
                        b_col = log2_add(b_col, b_top + tl.log2(b_part))
        tl.store(p_col + i_bh * K + o_j, b_col * LN2, mask=m_n)


class Columns(NamedTuple):
    """What pass 1 leaves of the columns; see :func:`i2am.kernels.attention.attention_kernel`."""

    sums: Tensor  # [B·H, splits, K and more]
    pivots: Tensor  # [B·H, splits]
    queries_per_split: int


def normalise(
    q: Tensor,
    k: Tensor,
    columns: Columns,
    row: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    queries: tuple[int, int],
    keys: tuple[int, int],
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """``(col [B, H, K] natural, peak [B·H, query tiles] log2)``; ``tiles`` are pass 2's, ``keys`` is the hull."""
    B, H, Nq, D = q.shape
    K = keys[1] - keys[0]
    peak_tiles = triton.cdiv(queries[1] - queries[0], tiles.m)
    tiles = columns_tiles(tiles)
    col = row.new_empty(B, H, K)
    peak = row.new_empty(B * H, peak_tiles)
    columns_kernel[B * H, triton.cdiv(K, tiles.n) + peak_tiles](
        q,
        k,
        mask,
        columns.sums,
        columns.pivots,
        row,
        col,
        peak,
        scale,
        H,
        Nq,
        k.shape[2],
        *queries,
        *keys,
        columns.sums.shape[1],
        columns.queries_per_split,
        columns.sums.stride(1),
        *q.stride()[:3],
        *k.stride()[:3],
        *mask_strides(mask),
        **tile_constants(D, tiles, mask_kind(mask), upcast(q.dtype)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return col, peak
