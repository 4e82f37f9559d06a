"""The thin sweep behind anybody's attention: with one side's normalisers known, sums over that side. README.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from i2am.kernels.attribution import precision
from i2am.kernels.primitives import DEAD, LOG2E, dot_qk, load_head, logits
from i2am.kernels.tiles import (
    Call,
    Configuration,
    Tiles,
    configuration,
    head_constants,
    head_types,
    mask_types,
    power_of_two_above,
    size_types,
    sweep_tiles,
)

STRIDES = ["x_strides", "y_strides", "norm_stride", "own_stride", "weight_strides"]
SIZES = ["sizes", "x_span", "y_span", "tiles_per_group", "tiles_per_split", "R"]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def sweep_kernel(
    x, x_strides,                 # [B, H, Nx, D], the side that stays; strides of B, H and N
    y, y_strides,                 # [B, H, Ny, D], the side that passes by; a descriptor ends with y_span
    mask, mask_strides,           # [B, H, Ny, Nx] bool, additive or None
    norm, norm_stride,            # [B·H, Y] natural log-sum-exp of the side that passes by; stride of B·H
    own, own_stride,              # [B·H, X] natural log-sum-exp of the side that stays, or None
    weights, weight_strides,      # [1 | B, R, Y], or None
    total_partial,                # [B·H, splits, X] Σ_y exp2(s − norm_y)
    column_sum, pivots,           # [B·H, splits, X] Σ_y exp2(s − pivot), [B·H, splits] log2; or None
    own_partial,                  # [B·H, splits, X] Σ_y exp2(s − own_x), or None
    weighted_partial,             # [B·H, splits, R, X] Σ_y w_ry exp2(s − norm_y), or None
    scale, sizes, x_span, y_span,  # log2(e) included; (H, Nx, Ny); [start, stop)
    tiles_per_group, tiles_per_split, R,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute ``total_x = Σ_y exp2(s_xy − norm_y)``: G2R for x = keys, y = queries; R2G for x = queries, y = keys.

    Every sum stays within a thread until its tile of x is done: no barrier, no shuffle and nothing read back in the
    loop. Grid: (B·H, x groups, y splits); each program owns one slot of every partial, for its tiles of x.
    """
    i_bh, i_group, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    H, Nx, Ny = sizes[0], sizes[1], sizes[2]
    i_b, i_h = i_bh // H, i_bh % H
    X, Y = x_span[1] - x_span[0], y_span[1] - y_span[0]
    if mask is not None:
        mask += i_b * mask_strides[0] + i_h * mask_strides[1]
    norm += i_bh * norm_stride
    i_slot = i_bh * tl.num_programs(2) + i_split
    if own is not None:
        own += i_bh * own_stride
    if weights is not None:
        weights += i_b * weight_strides[0]
        o_r = tl.arange(0, BR).to(tl.int64)
    first_m = i_split * tiles_per_split
    last_m = tl.minimum(first_m + tiles_per_split, tl.cdiv(Y, BM))
    pivot = float("-inf")
    if column_sum is not None:
        for i_m in range(first_m, last_m):
            o_i = i_m * BM + tl.arange(0, BM)
            pivot = tl.maximum(pivot, tl.max(tl.load(norm + o_i, mask=o_i < Y, other=float("-inf")), 0) * LOG2E)
        pivot = tl.where(pivot > DEAD, pivot, 0.0)
        if i_group == 0:
            tl.store(pivots + i_slot, pivot)

    for i_n in range(i_group * tiles_per_group, tl.minimum((i_group + 1) * tiles_per_group, tl.cdiv(X, BN))):
        o_j = i_n * BN + tl.arange(0, BN)  # [BN] among the side that stays
        m_n = o_j < X
        o_n = x_span[0] + o_j
        b_x = load_head(x, x_strides, i_b, i_h, x_span[0] + i_n * BN, Nx, BN, D, D_MAIN, D_TAIL, UNIT)
        b_total = tl.zeros([BM // 16, 8, BN], tl.float32)  # partial over rows: two of each 16 lie in one thread
        if column_sum is not None:
            b_column = tl.zeros([BM // 16, 8, BN], tl.float32)
        if own is not None:
            b_own_lse = tl.load(own + o_j, mask=m_n, other=float("-inf")) * LOG2E
            b_own_lse = tl.where(b_own_lse <= DEAD, float("inf"), b_own_lse)
            b_own = tl.zeros([BM // 16, 8, BN], tl.float32)
        if weights is not None:
            b_z = tl.zeros([BR, BN], tl.float32)

        for i_m in range(first_m, last_m):
            o_i = i_m * BM + tl.arange(0, BM)  # [BM] among the side that passes by
            m_m = o_i < Y
            b_y = load_head(y, y_strides, i_b, i_h, y_span[0] + i_m * BM, y_span[1], BM, D, D_MAIN, D_TAIL, UNIT)
            b_s = dot_qk(b_y, b_x, D_TAIL, UPCAST)  # [BM, BN]
            b_l, factor = logits(
                b_s, scale, mask, mask_strides, y_span[0] + o_i, o_n, Ny, Nx, EVEN_N, ROW_MASK
            )  # fmt: skip
            b_norm = tl.load(norm + o_i, mask=m_m, other=float("-inf")) * LOG2E  # [BM]
            m_dead = b_norm <= DEAD  # nothing is divided by the sum of what was masked throughout; a NaN stays one
            b_p = tl.exp2(b_l * factor - tl.where(m_dead, float("inf"), b_norm)[:, None])  # [BM, BN]
            b_total += tl.sum(tl.reshape(b_p, [BM // 16, 2, 8, BN]), 1)
            if column_sum is not None:
                b_u = tl.where(m_dead, 0.0, tl.exp2(b_norm - pivot))  # [BM]
                b_column += tl.sum(tl.reshape(b_p * b_u[:, None], [BM // 16, 2, 8, BN]), 1)
            if own is not None:
                b_e = tl.where(m_m[:, None], b_l * factor - b_own_lse[None, :], float("-inf"))
                b_own += tl.sum(tl.reshape(tl.exp2(b_e), [BM // 16, 2, 8, BN]), 1)
            if weights is not None:
                p_w = weights + o_r[:, None] * weight_strides[1] + o_i[None, :] * weight_strides[2]
                b_w = tl.load(p_w, mask=(o_r < R)[:, None] & m_m[None, :], other=0.0)  # [BR, BM]
                b_z = tl.dot(b_w, b_p, b_z, input_precision=PRECISION)  # [BR, BM] @ [BM, BN]

        tl.store(total_partial + i_slot * X + o_j, tl.sum(tl.reshape(b_total, [BM // 2, BN]), 0), mask=m_n)
        if column_sum is not None:
            tl.store(column_sum + i_slot * X + o_j, tl.sum(tl.reshape(b_column, [BM // 2, BN]), 0), mask=m_n)
        if own is not None:
            tl.store(own_partial + i_slot * X + o_j, tl.sum(tl.reshape(b_own, [BM // 2, BN]), 0), mask=m_n)
        if weights is not None:
            p_z = weighted_partial + i_slot * R * X + o_r[:, None] * X + o_j[None, :]
            tl.store(p_z, b_z, mask=(o_r < R)[:, None] & m_n[None, :])


def constants(call: Call, tiles: Tiles, unit: int, upcast: bool = False) -> dict[str, Any]:
    """Return the kernel's compile-time constants; ``call.keys`` is the length of the side that stays."""
    return head_constants(call.d, tiles, call.kind, unit, upcast) | {
        "ROW_MASK": call.kind is not None,  # either side may stay, so a mask by keys is read by both
        "EVEN_N": call.keys % tiles.n == 0,
        "BR": max(16, power_of_two_above(max(1, call.regions))),
        "PRECISION": precision(call.device),
    }


def configurations(call: Call) -> Iterator[Configuration]:
    """Yield what a launcher asks for behind somebody else's attention: the sweep for G2R, and the one for R2G."""
    if call.output or call.is_few:
        return
    tiles = sweep_tiles(call.d, call.itemsize, call.device, call.kind, call.regions, call.level).fit(call.keys)
    types = head_types(call, tiles, {"x": tiles.n, "y": tiles.m}) | mask_types(call)
    sizes = size_types(call)
    types |= {"norm": "*fp32", "total_partial": "*fp32", "scale": sizes["scale"], "sizes": sizes["sizes"]}
    types |= {"x_span": sizes["key_span"], "y_span": sizes["query_span"], "weight_strides": ("i32",) * 3}
    types |= dict.fromkeys(("norm_stride", "own_stride", "tiles_per_group", "tiles_per_split", "R"), "i32")
    columns = {"column_sum": "*fp32", "pivots": "*fp32"}
    columns |= {"weights": "*fp32", "weighted_partial": "*fp32"} if call.regions else {}
    own = {"own": "*fp32", "own_partial": "*fp32"} if call.mass else {}
    values = constants(call, tiles, call.unit)
    yield configuration("sweep-columns", sweep_kernel, types | columns, values, tiles)
    yield configuration("sweep", sweep_kernel, types | own, values, tiles)
