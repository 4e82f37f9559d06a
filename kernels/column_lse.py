"""Merge pass 1's per-split column sums into the column log-sum-exp; recompute the columns whose sum is unusable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from i2am.kernels.primitives import LN2, LOG2E, dot_qk, load_head, log2_add, logits
from i2am.kernels.tiles import (
    Call,
    Configuration,
    attribution_tiles,
    column_tiles,
    configuration,
    head_constants,
    head_types,
    mask_types,
    size_types,
)

TINY = tl.constexpr(2.0**-56)  # README: numerics

STRIDES = ["q_strides", "k_strides", "sum_stride", "column_stride"]
SIZES = ["sizes", "query_span", "key_span", "splits", "queries_per_split", "split_origin"]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def column_lse_kernel(
    q, q_strides,                        # [B, H, Nq, D]; strides of B, H and N
    k, k_strides,                        # [B, H, Nk, D]
    mask, mask_strides,                  # [B, H, Nq, Nk] bool, additive or None
    column_sum, sum_stride,              # [B·H, splits, K] in units of 2^pivot; stride of a split
    pivots,                              # [B·H, splits] log2
    row_lse,                             # [B·H, Nq] natural
    column_lse, column_stride,           # [B·H, K] natural; stride of B·H
    row_lse_max,                         # [B·H, query tiles] log2, of pass 2's query tiles; or None
    scale, sizes, query_span, key_span,  # log2(e) included; (H, Nq, Nk); [start, stop)
    splits, queries_per_split, split_origin,  # the first split begins at query split_origin
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute ``col_j = log Σ_splits 2^pivot · sum_j``, and ``row_lse_max = max_i row_i`` of pass 2's query tiles.

    Grid: (B·H, key tiles + query tiles).
    """
    i_bh, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    H, Nq, Nk = sizes[0], sizes[1], sizes[2]
    K = key_span[1] - key_span[0]
    key_tiles = tl.cdiv(K, BN)
    if i_n >= key_tiles:
        i_m = i_n - key_tiles
        o_m = query_span[0] + i_m * BM + tl.arange(0, BM)
        b_row = tl.load(row_lse + i_bh * Nq + o_m, mask=o_m < query_span[1], other=float("-inf"))
        query_tiles = tl.cdiv(query_span[1] - query_span[0], BM)
        if row_lse_max is not None:
            b_row = tl.where(b_row == b_row, b_row, float("inf"))  # NaN: pass 2 must not start from such a row's P
            tl.store(row_lse_max + i_bh * query_tiles + i_m, tl.max(b_row, 0) * LOG2E)
    else:
        o_j = i_n * BN + tl.arange(0, BN)  # [BN]
        m_n = o_j < K
        column_sum += i_bh * splits * sum_stride
        pivots += i_bh * splits
        first_split = (query_span[0] - split_origin) // queries_per_split
        last_split = tl.cdiv(query_span[1] - split_origin, queries_per_split)
        b_column = tl.full([BN], float("-inf"), tl.float32)
        b_sound = tl.full([BN], 1, tl.int32)
        for i_split in range(first_split, last_split):
            b_sum = tl.load(column_sum + i_split * sum_stride.to(tl.int64) + o_j, mask=m_n, other=1.0)
            b_sound = tl.where(b_sum >= TINY, b_sound, 0)
            b_column = log2_add(b_column, tl.load(pivots + i_split) + tl.log2(b_sum))

        if tl.min(b_sound, 0) == 0:
            i_b, i_h = i_bh // H, i_bh % H
            if mask is not None:
                mask += i_b * mask_strides[0] + i_h * mask_strides[1]
            o_n = key_span[0] + o_j
            b_column = tl.full([BN], float("-inf"), tl.float32)
            for i_split in range(first_split, last_split):
                b_sum = tl.load(column_sum + i_split * sum_stride.to(tl.int64) + o_j, mask=m_n, other=1.0)
                if tl.min((b_sum >= TINY).to(tl.int32), 0) == 1:
                    b_column = log2_add(b_column, tl.load(pivots + i_split) + tl.log2(b_sum))
                else:
                    first = tl.maximum(split_origin + i_split * queries_per_split, query_span[0])
                    last = tl.minimum(split_origin + (i_split + 1) * queries_per_split, query_span[1])
                    for i_m in range(first, last, BM):
                        o_m = i_m + tl.arange(0, BM)  # [BM]
                        b_q = load_head(q, q_strides, i_b, i_h, i_m, Nq, BM, D, D_MAIN, D_TAIL, UNIT)
                        b_k = load_head(k, k_strides, i_b, i_h, key_span[0] + i_n * BN, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                        b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
                        b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, True, ROW_MASK)
                        b_x = tl.where((o_m < last)[:, None], b_x, float("-inf"))  # [BM, BN]
                        b_top = tl.max(b_x, 0) * factor  # [BN]
                        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
                        b_part = tl.sum(tl.exp2(b_x * factor - b_top[None, :]), 0)
                        b_column = log2_add(b_column, b_top + tl.log2(b_part))
        tl.store(column_lse + i_bh * column_stride + o_j, b_column * LN2, mask=m_n)


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for in an attention call."""
    if not call.output or call.mass or call.regions or call.is_few:
        return
    tiles = attribution_tiles(call.d, call.itemsize, call.device, call.kind, 0, call.level).fit(call.keys)
    tiles = column_tiles(tiles)
    types = head_types(call, tiles, {"q": tiles.m, "k": tiles.n}) | mask_types(call)
    types |= dict.fromkeys(("column_sum", "pivots", "row_lse", "column_lse", "row_lse_max"), "*fp32")
    types |= size_types(call)
    types |= dict.fromkeys(("sum_stride", "column_stride", "splits", "queries_per_split", "split_origin"), "i32")
    values: dict[str, Any] = head_constants(call.d, tiles, call.kind, call.unit)
    yield configuration("columns", column_lse_kernel, types, values, tiles)
