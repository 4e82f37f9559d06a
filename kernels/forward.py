"""Pass 1: flash attention forward that also leaves column sums per split. Equations and numerics: README.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from i2am.kernels.primitives import (
    dot_pv,
    dot_qk,
    load_head,
    logits,
    nearest,
    power_of_two,
    scale_head,
    sum_columns,
    zero_head,
)
from i2am.kernels.rows import end_rows, soften, this_split
from i2am.kernels.tiles import (
    Call,
    Configuration,
    Tiles,
    attention_tiles,
    configuration,
    head_constants,
    head_types,
    lane_rows,
    mask_types,
    size_types,
)

HEADROOM = tl.constexpr(32.0)  # README: numerics


STRIDES = ["q_strides", "k_strides", "v_strides", "out_strides"]
SIZES = ["sizes", "query_span", "key_span", "tiles_per_split"]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def attention_fwd_kernel(
    q, q_strides,                        # [B, H, Nq, D]; strides of B, H and N
    k, k_strides,                        # [B, H, Nk, D]
    v, v_strides,                        # [B, H, Nk, D] or None
    mask, mask_strides,                  # [B, H, Nq, Nk] bool, additive or None
    out, out_strides,                    # [B, H, Nq, D] or None
    row_lse,                             # [B, H, Nq] natural
    column_sum,                          # [B·H, splits, whole key tiles] in units of 2^pivot, or None
    pivots,                              # [B·H, splits] log2
    scale, sizes, query_span, key_span,  # log2(e) included; (H, Nq, Nk); [start, stop)
    tiles_per_split,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LANE_ROWS: tl.constexpr,
    EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute ``O = softmax(S) V``, ``row_i = log Σ_j exp(S_ij)``, and ``sum_j = Σ_i exp2(s_ij − pivot)`` per split.

    Grid: (B·H, splits). A program walks the query tiles of its split, and owns one slot of the last two.
    """
    H, Nq, Nk = sizes[0], sizes[1], sizes[2]
    i_bh, i_b, i_h, i_split, i_slot = this_split(H)
    if mask is not None:
        mask += i_b * mask_strides[0] + i_h * mask_strides[1]
    row_lse += i_bh * Nq
    key_first = key_span[0] // BN * BN  # the sums are kept in whole tiles: aligned, and without a mask
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(Nq, BM))
    fresh = tl.maximum(first, query_span[0] // BM)  # the first query tile that writes to the slot
    pivot = 0.0
    if column_sum is not None:
        column_sum += i_slot * tl.cdiv(key_span[1] - key_first, BN) * BN
        # The pivot: the largest logit of the first tile that counts. It takes the way through memory that is the
        # program's own: Triton 3.6 and 3.7 do not compile a product's reduction to one number for tensor memory.
        b_q = load_head(q, q_strides, i_b, i_h, fresh * BM, Nq, BM, D, D_MAIN, D_TAIL, UNIT)
        b_k = load_head(k, k_strides, i_b, i_h, key_first, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
        o_m, o_n = fresh * BM + tl.arange(0, BM), key_first + tl.arange(0, BN)
        b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
        b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
        m_counts = (o_m >= query_span[0]) & (o_m < tl.minimum(query_span[1], last * BM))  # none of another split's
        tl.store(row_lse + o_m, tl.max(b_x, 1) * factor, mask=m_counts)
        tl.debug_barrier()
        pivot = nearest(tl.max(tl.load(row_lse + o_m, mask=m_counts, other=float("-inf")), 0))
        pivot = tl.where(pivot == float("-inf"), 0.0, pivot)
        tl.store(pivots + i_slot, pivot)

    for i_m in range(first, last):
        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        m_generated = (o_m >= query_span[0]) & (o_m < query_span[1])  # [BM]
        generated = (i_m * BM < query_span[1]) & (i_m * BM + BM > query_span[0])
        b_q = load_head(q, q_strides, i_b, i_h, i_m * BM, Nq, BM, D, D_MAIN, D_TAIL, UNIT)
        b_m = tl.full([BM], float("-inf"), tl.float32)  # running row maximum, rounded
        b_l = tl.zeros([BM], tl.float32)  # running row sum
        if v is not None:
            b_o = zero_head(BM, D_MAIN, D_TAIL)

        tl.debug_barrier()  # the columns read below were written by other threads for the previous query tile
        for i_n in range(0, Nk, BN):
            o_n = i_n + tl.arange(0, BN)  # [BN]
            b_k = load_head(k, k_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
            b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
            b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)

            b_p, b_rescale, b_m, b_l = soften(b_x, factor, b_m, b_l)

            if column_sum is not None:  # noqa: SIM102 (the compiler's question, apart from the program's)
                if generated & (i_n < key_span[1]) & (i_n >= key_first):
                    m_counts = m_generated & (b_m > float("-inf"))
                    # A row beyond the headroom makes every column of the split NaN: column_lse takes these afresh.
                    b_u = tl.where(b_m - pivot <= HEADROOM, power_of_two(b_m - pivot), float("nan"))
                    b_u = tl.where(m_counts, b_u, 0.0)  # [BM]
                    p_slot = column_sum + (o_n - key_first)
                    b_before = tl.load(p_slot, mask=(o_n >= 0) & (i_m > fresh), other=0.0)
                    tl.store(p_slot, b_before + sum_columns(b_p * b_u[:, None], BM, BN, LANE_ROWS))

            if v is not None:
                b_v = load_head(v, v_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                b_o = dot_pv(b_p, b_v, scale_head(b_o, b_rescale, D_TAIL), D_TAIL, UPCAST)

        end_rows(
            b_o if v is not None else None, b_m, b_l, q, q_strides, k, k_strides, v, v_strides, mask, mask_strides,
            out, out_strides, row_lse, scale, i_b, i_h, i_m * BM, Nq, Nk,
            D, D_MAIN, D_TAIL, UNIT, OUT_UNIT, BM, BN, EVEN_N, ROW_MASK, UPCAST,
        )  # fmt: skip


def constants(call: Call, tiles: Tiles, unit: int, out_unit: int, upcast: bool = False) -> dict[str, Any]:
    """Return the kernel's compile-time constants."""
    return head_constants(call.d, tiles, call.kind, unit, upcast) | {
        "OUT_UNIT": out_unit,
        "LANE_ROWS": lane_rows(call.device, tiles, call.itemsize),
        "EVEN_N": call.keys % tiles.n == 0,
    }


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for in an attention call."""
    if call.is_few:
        return
    tiles = attention_tiles(call.d, call.itemsize, call.device, call.kind, call.keys, call.level)
    types = head_types(call, tiles, {"q": tiles.m, "k": tiles.n}) | mask_types(call)
    if call.output:
        types |= head_types(call, tiles, {"v": tiles.n}) | {"out": f"*{call.dtype}"}
    types |= {"row_lse": "*fp32", "column_sum": "*fp32", "pivots": "*fp32"}
    types |= {"v_strides": ("i32",) * 3, "out_strides": ("i32",) * 3}
    types |= size_types(call)
    types["tiles_per_split"] = "i32"
    values = constants(call, tiles, call.unit, call.unit)
    yield configuration("attention", attention_fwd_kernel, types, values, tiles)
