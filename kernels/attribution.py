"""Pass 2: both normalisers known, q kᵀ once more gives R2G, G2R, mass and SRAM. Equations and numerics: README.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from i2am.kernels.primitives import DEAD, LOG2E, dot_qk, load_head, logits
from i2am.kernels.tiles import (
    Call,
    Configuration,
    Device,
    Tiles,
    attribution_tiles,
    configuration,
    head_constants,
    head_types,
    mask_types,
    power_of_two_above,
    size_types,
)

REACH = tl.constexpr(64.0)  # README: numerics

STRIDES = ["q_strides", "k_strides", "column_stride", "region_strides"]
SIZES = ["sizes", "query_span", "key_span", "tiles_per_group", "tiles_per_split", "R"]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def attribution_kernel(
    q, q_strides,                        # [B, H, Nq, D]; strides of B, H and N. A descriptor ends with query_span,
    k, k_strides,                        # [B, H, Nk, D]  or key_span
    mask, mask_strides,                  # [B, H, Nq, Nk] bool, additive or None
    regions, region_strides,             # [1 | B, R, Q] weights, or None
    row_lse,                             # [B, H, Nq] natural
    column_lse, column_stride,           # [B·H, K] natural, of this reference's columns; stride of B·H
    row_lse_max,                         # [B·H, query tiles] log2
    r2g_partial,                         # [B·H, key groups, Q] Σ_j C_ij
    g2r_partial,                         # [B·H, query splits, K] Σ_i P_ij
    mass_partial,                        # [B·H, key groups, Q] Σ_j P_ij, or None
    sram_partial,                        # [B·H, query splits, R, K] Σ_i w_ri P_ij, or None
    scale, sizes, query_span, key_span,  # log2(e) included; (H, Nq, Nk); [start, stop)
    tiles_per_group, tiles_per_split, R,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum ``P_ij = exp2(s_ij − row_i)`` over i, and ``C_ij = P_ij · 2^row_i / 2^col_j``, summed over j.

    The ratio is split at ``c = min_j col_j`` into ``exp2(row_i − c) · exp2(c − col_j)``, two vectors; a tile whose rows
    reach too far above ``c`` (P would underflow where C does not) takes ``exp2(s_ij − col_j)`` instead.

    Grid: (B·H, key groups, query splits). A key tile stays while the split's query tiles pass by; each program owns one
    slot of every partial.
    """
    i_bh, i_group, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    H, Nq = sizes[0], sizes[1]
    i_b, i_h = i_bh // H, i_bh % H
    Q, K = query_span[1] - query_span[0], key_span[1] - key_span[0]
    query_tiles = tl.cdiv(Q, BM)
    if mask is not None:
        mask += i_b * mask_strides[0] + i_h * mask_strides[1]
    row_lse += i_bh * Nq
    column_lse += i_bh * column_stride
    row_lse_max += i_bh * query_tiles
    o_row_slot = (i_bh * tl.num_programs(1) + i_group) * Q
    i_column_slot = i_bh * tl.num_programs(2) + i_split
    r2g_partial += o_row_slot
    g2r_partial += i_column_slot * K
    if mass_partial is not None:
        mass_partial += o_row_slot
    if sram_partial is not None:
        regions += i_b * region_strides[0]
        sram_partial += i_column_slot * R * K
        o_r = tl.arange(0, BR).to(tl.int64)

    first_n, first_m = i_group * tiles_per_group, i_split * tiles_per_split
    last_m = tl.minimum(first_m + tiles_per_split, query_tiles)
    for i_n in range(first_n, tl.minimum(first_n + tiles_per_group, tl.cdiv(K, BN))):
        o_j = i_n * BN + tl.arange(0, BN)  # [BN] among the reference keys
        m_n = o_j < K
        # Past the end the last key again: a zero's P could be infinite, and a key of nobody's need not be a number.
        b_k = load_head(k, k_strides, i_b, i_h, key_span[0] + i_n * BN, key_span[1], BN, D, D_MAIN, D_TAIL, UNIT, True)
        b_column = tl.load(column_lse + o_j, mask=m_n, other=float("-inf")) * LOG2E  # [BN]
        b_column = tl.where(b_column <= DEAD, float("inf"), b_column)  # nothing is divided by a masked column's sum
        c = tl.min(b_column, 0)
        b_cf = tl.where(b_column == float("inf"), 0.0, tl.exp2(c - b_column))  # [BN]
        b_g = tl.zeros([BM // 16, 8, BN], tl.float32)  # partial over rows
        if sram_partial is not None:
            b_z = tl.zeros([BR, BN], tl.float32)

        tl.debug_barrier()  # the row partials read below were written by other threads for the previous key tile
        for i_m in range(first_m, last_m):
            o_i = i_m * BM + tl.arange(0, BM)  # [BM] among the generated queries
            m_m = o_i < Q
            o_m = query_span[0] + o_i
            b_q = load_head(
                q, q_strides, i_b, i_h, query_span[0] + i_m * BM, query_span[1], BM, D, D_MAIN, D_TAIL, UNIT
            )
            b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)  # [BM, BN]
            # With a mask or by a descriptor, what lies past the end is masked: there is no last key again.
            b_x, factor = logits(
                b_s, scale, mask, mask_strides, o_m, key_span[0] + o_j,
                query_span[1], key_span[1], EVEN_N if UNIT == 0 else True, ROW_MASK,
            )  # fmt: skip

            near = tl.load(row_lse_max + i_m) - c <= REACH
            b_r = tl.zeros([BM], tl.float32)
            if not near:  # loads the columns' sums again, so that the usual path need not keep them in registers
                b_far = tl.load(column_lse + o_j, mask=m_n, other=float("-inf")) * LOG2E  # [BN]
                b_far = tl.where(b_far <= DEAD, float("inf"), b_far)
                b_r = tl.sum(tl.exp2(b_x * factor - b_far[None, :]), 1)

            b_row = tl.load(row_lse + o_m, mask=m_m, other=float("-inf")) * LOG2E  # [BM]
            m_dead = b_row <= DEAD  # a NaN stays one
            b_row = tl.where(m_dead, float("inf"), b_row)
            b_p = tl.exp2(b_x * factor - b_row[:, None])  # [BM, BN]
            b_rf = tl.where(m_dead, 0.0, tl.exp2(b_row - c))  # [BM]
            b_r = tl.where(near, b_rf * tl.sum(b_p * b_cf[None, :], 1), b_r)
            m_later = m_m & (i_n > first_n)
            tl.store(r2g_partial + o_i, b_r + tl.load(r2g_partial + o_i, mask=m_later, other=0.0), mask=m_m)
            if mass_partial is not None:
                b_mass = tl.sum(b_p if EVEN_N else tl.where(m_n[None, :], b_p, 0.0), 1)
                tl.store(mass_partial + o_i, b_mass + tl.load(mass_partial + o_i, mask=m_later, other=0.0), mask=m_m)

            # In the layout of the product a thread holds two rows of each 16, so this sum stays within the thread, and
            # no thread waits for another before the loop is over.
            b_g += tl.sum(tl.reshape(b_p, [BM // 16, 2, 8, BN]), 1)
            if sram_partial is not None:
                p_w = regions + o_r[:, None] * region_strides[1] + o_i[None, :] * region_strides[2]
                b_w = tl.load(p_w, mask=(o_r < R)[:, None] & m_m[None, :], other=0.0)  # [BR, BM]
                b_z = tl.dot(b_w, b_p, b_z, input_precision=PRECISION)  # [BR, BM] @ [BM, BN]

        tl.store(g2r_partial + o_j, tl.sum(tl.reshape(b_g, [BM // 2, BN]), 0), mask=m_n)
        if sram_partial is not None:
            tl.store(sram_partial + o_r[:, None] * K + o_j[None, :], b_z, mask=(o_r < R)[:, None] & m_n[None, :])


def constants(call: Call, tiles: Tiles, unit: int, upcast: bool = False) -> dict[str, Any]:
    """Return the kernel's compile-time constants; ``call.keys`` are one reference's here."""
    return head_constants(call.d, tiles, call.kind, unit, upcast) | {
        "EVEN_N": call.keys % tiles.n == 0,
        "BR": max(16, power_of_two_above(max(1, call.regions))),
        "PRECISION": precision(call.device),
    }


def precision(device: Device) -> str:
    """Return how float32 region weights are multiplied: in three tf32 parts where there are such units."""
    return "tf32x3" if device.units in ("mma", "tmem") else "ieee"


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for in an attention call with many keys."""
    if not call.output or call.is_few:
        return
    tiles = attribution_tiles(call.d, call.itemsize, call.device, call.kind, call.regions, call.level).fit(call.keys)
    types = head_types(call, tiles, {"q": tiles.m, "k": tiles.n}) | mask_types(call)
    types |= dict.fromkeys(("row_lse", "column_lse", "row_lse_max", "r2g_partial", "g2r_partial"), "*fp32")
    if call.mass:
        types["mass_partial"] = "*fp32"
    if call.regions:
        types |= {"regions": "*fp32", "sram_partial": "*fp32"}
    types |= {"region_strides": ("i32",) * 3, "column_stride": "i32"}
    types |= size_types(call)
    types |= dict.fromkeys(("tiles_per_group", "tiles_per_split", "R"), "i32")
    yield configuration("attribution", attribution_kernel, types, constants(call, tiles, call.unit), tiles)
