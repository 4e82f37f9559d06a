"""Few keys, second of two launches: R2G and mass from the finished columns, and every addition to the running sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from i2am.kernels.accumulate import add
from i2am.kernels.primitives import DEAD, LN2, LOG2E, dot_qk, load_head, logits
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

STRIDES = ["q_strides", "k_strides", "r2g_strides", "g2r_strides", "mass_strides", "sram_strides"]
SIZES = ["sizes", "query_span", "key_span", "spans", "tiles_per_split", "splits", "R"]


@triton.jit
def merge_columns(column_partial, splits, K, o_j, m_n, SPLITS: tl.constexpr):
    """Return ``log2 Σ_splits 2^partial [BN]`` of ``column_partial [splits, K]``, -inf where nothing is."""
    o_s = tl.arange(0, SPLITS)
    m = (o_s < splits)[:, None] & m_n[None, :]
    b = tl.load(column_partial + o_s[:, None] * K + o_j[None, :], mask=m, other=float("-inf"))  # [SPLITS, BN]
    b_top = tl.max(b, 0)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top + tl.log2(tl.sum(tl.exp2(b - b_top[None, :]), 0))


@triton.jit(do_not_specialize=STRIDES + SIZES)
def few_attribution_kernel(
    q, q_strides,                        # [B, H, Nq, D]; strides of B, H and N
    k, k_strides,                        # [B, H, Nk, D]
    mask, mask_strides,                  # [B, H, Nq, Nk] bool, additive or None
    row_lse,                             # [B, H, Nq] natural
    column_partial,                      # [B·H, splits, K] log2, of the hull's columns
    g2r_partial,                         # [B·H, splits, K]
    sram_partial,                        # [B·H, splits, R, K] or None
    col_lse,                             # [B·H, K] natural
    r2g, r2g_strides,                    # [B, H, Q] running sums, one of every reference; their strides of B and H
    g2r, g2r_strides,                    # [B, H, Kn]
    mass, mass_strides,                  # [B, H, Q] or None
    sram, sram_strides,                  # [B, H, R, Kn] or None; strides of B, H and R
    scale, sizes, query_span, key_span,  # log2(e) included; (H, Nq, Nk); [start, stop)
    spans, tiles_per_split, splits, R,   # [start, stop) of every reference; splits of the first launch
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, REFERENCES: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add ``r2g_i += Σ_j exp2(s_ij − col_j) / K``, ``mass_i += Σ_j P_ij``, and the partials of G2R and SRAM.

    Grid: (B·H, query splits + 1 + R). A program owns its split's rows of every running sum; the next one all columns of
    ``col_lse`` and G2R, the others those of one region each.
    """
    i_bh, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    H, Nq, Nk = sizes[0], sizes[1], sizes[2]
    i_b, i_h = i_bh // H, i_bh % H
    Q, K = query_span[1] - query_span[0], key_span[1] - key_span[0]
    row_splits = tl.num_programs(1) - 1 - R
    column_partial += i_bh * splits * K
    if i_split < row_splits:
        if mask is not None:
            mask += i_b * mask_strides[0] + i_h * mask_strides[1]
        row_lse += i_bh * Nq
        first = i_split * tiles_per_split * BM
        last = tl.minimum(first + tiles_per_split * BM, Q)
        for n in tl.static_range(REFERENCES):
            start, stop = spans[2 * n], spans[2 * n + 1]
            p_r2g = r2g[n] + i_b * r2g_strides[2 * n] + i_h * r2g_strides[2 * n + 1]
            if mass is not None:
                p_mass = mass[n] + i_b * mass_strides[2 * n] + i_h * mass_strides[2 * n + 1]
            for i_n in range(start, stop, BN):
                o_n = i_n + tl.arange(0, BN)  # [BN]
                m_n = o_n < stop
                b_k = load_head(k, k_strides, i_b, i_h, i_n, stop, BN, D, D_MAIN, D_TAIL, UNIT)
                b_column = merge_columns(column_partial, splits, K, o_n - key_span[0], m_n, SPLITS)
                b_column = tl.where(b_column <= DEAD, float("inf"), b_column)  # a masked column is shared out to nobody
                tl.debug_barrier()  # the sums read below were written by other threads for the previous key tile
                for i_m in range(first, last, BM):
                    o_i = i_m + tl.arange(0, BM)  # [BM] among the generated queries
                    m_m = o_i < Q
                    o_m = query_span[0] + o_i
                    b_q = load_head(
                        q, q_strides, i_b, i_h, query_span[0] + i_m, query_span[1], BM, D, D_MAIN, D_TAIL, UNIT
                    )
                    b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)  # [BM, BN]
                    b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
                    b_r = tl.sum(tl.exp2(b_x * factor - b_column[None, :]), 1) * (1.0 / (stop - start))
                    tl.store(p_r2g + o_i, tl.load(p_r2g + o_i, mask=m_m, other=0.0) + b_r, mask=m_m)
                    if mass is not None:
                        b_row = tl.load(row_lse + o_m, mask=m_m, other=float("-inf")) * LOG2E  # [BM]
                        b_row = tl.where(b_row <= DEAD, float("inf"), b_row)
                        b_p = tl.where(m_n[None, :], tl.exp2(b_x * factor - b_row[:, None]), 0.0)
                        b_mass = tl.sum(b_p, 1)
                        tl.store(p_mass + o_i, tl.load(p_mass + o_i, mask=m_m, other=0.0) + b_mass, mask=m_m)
    elif i_split == row_splits:
        for i_n in range(0, K, BN):
            o_j = i_n + tl.arange(0, BN)
            b_column = merge_columns(column_partial, splits, K, o_j, o_j < K, SPLITS)
            tl.store(col_lse + i_bh * K + o_j, b_column * LN2, mask=o_j < K)
        for n in tl.static_range(REFERENCES):
            total = g2r[n] + i_b * g2r_strides[2 * n] + i_h * g2r_strides[2 * n + 1]
            partial = g2r_partial + i_bh * splits * K + spans[2 * n] - key_span[0]
            for i_n in range(0, spans[2 * n + 1] - spans[2 * n], BN):
                add(total, partial, splits, K, i_n + tl.arange(0, BN), spans[2 * n + 1] - spans[2 * n], 1.0 / Q)
    else:
        if sram is not None:
            i_r = i_split - row_splits - 1
            for n in tl.static_range(REFERENCES):
                total = sram[n] + i_b * sram_strides[3 * n] + i_h * sram_strides[3 * n + 1]
                total = total + i_r.to(tl.int64) * sram_strides[3 * n + 2]
                partial = sram_partial + (i_bh * splits * R + i_r) * K + spans[2 * n] - key_span[0]
                for i_n in range(0, spans[2 * n + 1] - spans[2 * n], BN):
                    o_n = i_n + tl.arange(0, BN)
                    add(total, partial, splits, R.to(tl.int64) * K, o_n, spans[2 * n + 1] - spans[2 * n], 1.0)


def constants(
    call: Call, tiles: Tiles, references: int, splits: int, unit: int, upcast: bool = False
) -> dict[str, Any]:
    """Return the kernel's compile-time constants."""
    return head_constants(call.d, tiles, call.kind, unit, upcast) | {
        "EVEN_N": call.keys % tiles.n == 0,
        "REFERENCES": references,
        "SPLITS": max(16, power_of_two_above(splits)),
    }


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for where keys are few, with one reference and with two."""
    if not call.is_few:
        return
    tiles = few_tiles(call.d, call.itemsize, call.device, call.kind, call.regions, call.level).fit(call.keys)
    for n in (1, 2):
        types = head_types(call, tiles, {"q": tiles.m, "k": tiles.n}) | mask_types(call)
        types |= dict.fromkeys(("row_lse", "column_partial", "g2r_partial", "col_lse"), "*fp32")
        types |= dict.fromkeys(("r2g", "g2r"), ("*fp32",) * n)
        if call.mass:
            types["mass"] = ("*fp32",) * n
        if call.regions:
            types |= {"sram": ("*fp32",) * n, "sram_partial": "*fp32"}
        types |= dict.fromkeys(("r2g_strides", "g2r_strides", "mass_strides"), ("i32",) * 2 * n)
        types |= {"sram_strides": ("i32",) * 3 * n, "spans": ("i32",) * 2 * n}
        types |= dict.fromkeys(("tiles_per_split", "splits", "R"), "i32")
        types |= size_types(call)
        values = constants(call, tiles, n, 16, call.unit)
        name = "few-attribution" if n == 1 else f"few-attribution, {n} references,"
        yield configuration(name, few_attribution_kernel, types, values, tiles)
