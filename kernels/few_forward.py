"""Few keys, first of two launches: output, row log-sum-exp, and per split of the queries what columns amount to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from i2am.kernels.attribution import precision
from i2am.kernels.primitives import (
    DEAD,
    LOG2E,
    dot_pv,
    dot_qk,
    load_head,
    log2_add,
    logits,
    scale_head,
    zero_head,
)
from i2am.kernels.rows import end_rows, soften, this_split
from i2am.kernels.tiles import (
    Call,
    Configuration,
    Tiles,
    configuration,
    few_tiles,
    head_constants,
    head_types,
    mask_types,
    power_of_two_above,
    size_types,
)

TINY = tl.constexpr(2.0**-56)  # README: numerics

STRIDES = ["q_strides", "k_strides", "v_strides", "out_strides", "region_strides"]
SIZES = ["sizes", "query_span", "key_span", "tiles_per_split", "R"]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def few_forward_kernel(
    q, q_strides,                        # [B, H, Nq, D]; strides of B, H and N
    k, k_strides,                        # [B, H, Nk, D]
    v, v_strides,                        # [B, H, Nk, D] or None
    mask, mask_strides,                  # [B, H, Nq, Nk] bool, additive or None
    regions, region_strides,             # [1 | B, R, Q] weights, or None
    out, out_strides,                    # [B, H, Nq, D] or None
    row_lse,                             # [B, H, Nq] natural; read where ROWS_GIVEN
    column_partial,                      # [B·H, splits, K] log2 Σ_i exp2(s_ij), of the split's generated queries
    g2r_partial,                         # [B·H, splits, K] Σ_i P_ij
    sram_partial,                        # [B·H, splits, R, K] Σ_i w_ri P_ij, or None
    scale, sizes, query_span, key_span,  # log2(e) included; (H, Nq, Nk); [start, stop)
    tiles_per_split, R,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, ROWS_GIVEN: tl.constexpr,
    EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute ``O = softmax(S) V`` of a split's queries, then walk its generated ones again, key tile by key tile.

    The second walk knows the rows' log-sum-exp, so its sums stay within a thread until a key tile is done. Keys are
    few: doing their products twice is cheaper than a launch.

    Grid: (B·H, splits). A program owns its split's rows, and one slot of every partial.
    """
    H, Nq, Nk = sizes[0], sizes[1], sizes[2]
    i_bh, i_b, i_h, i_split, i_slot = this_split(H)
    K = key_span[1] - key_span[0]
    if mask is not None:
        mask += i_b * mask_strides[0] + i_h * mask_strides[1]
    row_lse += i_bh * Nq
    column_partial += i_slot * K
    g2r_partial += i_slot * K
    first = i_split * tiles_per_split * BM
    last = tl.minimum(first + tiles_per_split * BM, Nq)

    if not ROWS_GIVEN:
        for i_m in range(first, last, BM):
            o_m = i_m + tl.arange(0, BM)  # [BM]
            b_q = load_head(q, q_strides, i_b, i_h, i_m, Nq, BM, D, D_MAIN, D_TAIL, UNIT)
            b_m = tl.full([BM], float("-inf"), tl.float32)  # running row maximum, rounded
            b_l = tl.zeros([BM], tl.float32)  # running row sum
            if v is not None:
                b_o = zero_head(BM, D_MAIN, D_TAIL)
            for i_n in range(0, Nk, BN):
                o_n = i_n + tl.arange(0, BN)  # [BN]
                b_k = load_head(k, k_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
                b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
                b_p, b_rescale, b_m, b_l = soften(b_x, factor, b_m, b_l)
                if v is not None:
                    b_v = load_head(v, v_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                    b_o = dot_pv(b_p, b_v, scale_head(b_o, b_rescale, D_TAIL), D_TAIL, UPCAST)
            end_rows(
                b_o if v is not None else None, b_m, b_l, q, q_strides, k, k_strides, v, v_strides,
                mask, mask_strides,
                out, out_strides, row_lse, scale, i_b, i_h, i_m, Nq, Nk,
                D, D_MAIN, D_TAIL, UNIT, OUT_UNIT, BM, BN, EVEN_N, ROW_MASK, UPCAST,
            )  # fmt: skip
        tl.debug_barrier()  # the rows read below were written by other threads

    start, stop = tl.maximum(first, query_span[0]), tl.minimum(last, query_span[1])
    pivot = float("-inf")  # the largest row log-sum-exp of the split, in whose units its column sums are kept
    for i_m in range(start, stop, BM):
        o_m = i_m + tl.arange(0, BM)
        pivot = tl.maximum(pivot, tl.max(tl.load(row_lse + o_m, mask=o_m < stop, other=float("-inf")), 0) * LOG2E)
    pivot = tl.where(pivot > DEAD, pivot, 0.0)
    for i_n in range(0, K, BN):
        o_j = i_n + tl.arange(0, BN)  # [BN] among the hull
        m_n = o_j < K
        o_n = key_span[0] + o_j
        b_k = load_head(k, k_strides, i_b, i_h, key_span[0] + i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
        b_g = tl.zeros([BM // 16, 8, BN], tl.float32)  # partial over rows: two of each 16 lie in one thread
        b_c = tl.zeros([BM // 16, 8, BN], tl.float32)
        if sram_partial is not None:
            o_r = tl.arange(0, BR).to(tl.int64)
            b_z = tl.zeros([BR, BN], tl.float32)
        for i_m in range(start, stop, BM):
            o_m = i_m + tl.arange(0, BM)  # [BM]
            m_m = o_m < stop
            b_q = load_head(q, q_strides, i_b, i_h, i_m, stop, BM, D, D_MAIN, D_TAIL, UNIT)
            b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)  # [BM, BN]
            b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
            b_row = tl.load(row_lse + o_m, mask=m_m, other=float("-inf")) * LOG2E  # [BM]
            m_dead = b_row <= DEAD  # nothing is divided by the sum of what was masked throughout; a NaN stays one
            b_p = tl.exp2(b_x * factor - tl.where(m_dead, float("inf"), b_row)[:, None])  # [BM, BN]
            b_u = tl.where(m_dead, 0.0, tl.exp2(b_row - pivot))  # [BM] at most 1
            b_g += tl.sum(tl.reshape(b_p, [BM // 16, 2, 8, BN]), 1)
            b_c += tl.sum(tl.reshape(b_p * b_u[:, None], [BM // 16, 2, 8, BN]), 1)
            if sram_partial is not None:
                o_i = o_m - query_span[0]
                p_w = regions + i_b * region_strides[0] + o_r[:, None] * region_strides[1]
                p_w = p_w + o_i[None, :] * region_strides[2]
                b_w = tl.load(p_w, mask=(o_r < R)[:, None] & m_m[None, :], other=0.0)  # [BR, BM]
                b_z = tl.dot(b_w, b_p, b_z, input_precision=PRECISION)  # [BR, BM] @ [BM, BN]
        tl.store(g2r_partial + o_j, tl.sum(tl.reshape(b_g, [BM // 2, BN]), 0), mask=m_n)
        if sram_partial is not None:
            p_z = sram_partial + i_slot * R * K + o_r[:, None] * K + o_j[None, :]
            tl.store(p_z, b_z, mask=(o_r < R)[:, None] & m_n[None, :])
        b_sum = tl.sum(tl.reshape(b_c, [BM // 2, BN]), 0)
        b_column = pivot + tl.log2(b_sum)
        if (
            tl.min(tl.where((b_sum >= TINY) | ~m_n, 1, 0), 0) == 0
        ):  # far below the rows, or NaN: exactly, as log-sum-exps
            b_column = tl.full([BN], float("-inf"), tl.float32)
            for i_m in range(start, stop, BM):
                o_m = i_m + tl.arange(0, BM)
                b_q = load_head(q, q_strides, i_b, i_h, i_m, stop, BM, D, D_MAIN, D_TAIL, UNIT)
                b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
                b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
                b_x = tl.where((o_m < stop)[:, None], b_x, float("-inf"))
                b_top = tl.max(b_x, 0) * factor  # [BN]
                b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
                b_column = log2_add(b_column, b_top + tl.log2(tl.sum(tl.exp2(b_x * factor - b_top[None, :]), 0)))
        tl.store(column_partial + o_j, b_column, mask=m_n)


def constants(
    call: Call, tiles: Tiles, unit: int, out_unit: int, rows_given: bool, upcast: bool = False
) -> dict[str, Any]:
    """Return the kernel's compile-time constants."""
    return head_constants(call.d, tiles, call.kind, unit, upcast) | {
        "OUT_UNIT": out_unit,
        "EVEN_N": call.keys % tiles.n == 0,
        "BR": max(16, power_of_two_above(max(1, call.regions))),
        "ROWS_GIVEN": rows_given,
        "PRECISION": precision(call.device),
    }


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for where keys are few: with an output, or behind somebody else's attention."""
    if not call.is_few:
        return
    tiles = few_tiles(call.d, call.itemsize, call.device, call.kind, call.regions, call.level).fit(call.keys)
    types = head_types(call, tiles, {"q": tiles.m, "k": tiles.n}) | mask_types(call)
    if call.output:
        types |= head_types(call, tiles, {"v": tiles.n}) | {"out": f"*{call.dtype}"}
    types |= {"v_strides": ("i32",) * 3, "out_strides": ("i32",) * 3, "region_strides": ("i32",) * 3}
    types |= dict.fromkeys(("row_lse", "column_partial", "g2r_partial"), "*fp32")
    if call.regions:
        types |= {"regions": "*fp32", "sram_partial": "*fp32"}
    types |= size_types(call)
    types |= {"tiles_per_split": "i32", "R": "i32"}
    values = constants(call, tiles, call.unit, call.unit, not call.output)
    yield configuration("few-forward", few_forward_kernel, types, values, tiles)
