"""Pass 1, a flash forward that also leaves the column log-sum-exp, and the launcher of both passes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from i2am.kernels import attribution, configuration
from i2am.kernels.reduce import combine
from i2am.kernels.tile import LN2, dot, load_rows, log2_add, mask_scores, store_rows

TINY = tl.constexpr(2.0**-80)  # column sums between these lost nothing that float32 could have kept
HUGE = tl.constexpr(2.0**80)
HEADROOM = tl.constexpr(16.0)


@triton.jit
def attention_kernel(
    p_q,  # [B, H, Nq, D]
    p_k,  # [B, H, Nk, D]
    p_v,  # [B, H, Nk, D] or None
    p_mask,  # [B, H, Nq, Nk] bool, additive or None
    p_out,  # [B, H, Nq, D] or None
    p_row,  # [B, H, Nq] natural log-sum-exp of the rows
    p_col,  # [B·H, splits, K] log2-sum-exp of the columns over one split's queries; starts at -inf
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
    """``O = softmax(S) V``, ``row_i = log Σ_j exp(S_ij)``, ``col_j = log2 Σ_i exp(S_ij)`` over the split's queries.

    The column sums reuse the row softmax's exponentials: ``Σ_i exp2(s_ij) = 2^pivot Σ_i p_ij · exp2(m_i - pivot)`` with
    ``p_ij = exp2(s_ij - m_i)`` and the running maximum ``m_i``. Where that product could lose a column, the tile takes
    its columns' exponentials afresh and moves the pivot.

    Grid: (B·H, splits); ``scale`` includes log2(e). Each program owns one slot of ``p_col`` and walks its query tiles.
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
    p_col += (i_bh * tl.num_programs(1) + i_split) * (key_stop - key_start)

    pivot = float("nan")  # the first tile has none yet: not-a-number sends it the exact way
    first = i_split * tiles_per_split
    for i_m in range(first, min(first + tiles_per_split, tl.cdiv(Nq, BM))):
        o_m = i_m * BM + tl.arange(0, BM)  # [BM]
        m_generated = (o_m >= query_start) & (o_m < query_stop)  # [BM]
        generated = (i_m * BM < query_stop) & (i_m * BM + BM > query_start)
        b_q = load_rows(p_q, o_m, Nq, stride_qn, 0, D_MAIN, D)  # [BM, D_MAIN]
        b_m = tl.full([BM], float("-inf"), tl.float32)  # running row maximum
        b_l = tl.zeros([BM], tl.float32)  # running row sum
        if D_TAIL > 0:
            b_qt = load_rows(p_q, o_m, Nq, stride_qn, D_MAIN, D_TAIL, D)  # [BM, D_TAIL]
        if p_v is not None:
            b_o = tl.zeros([BM, D_MAIN], tl.float32)
            if D_TAIL > 0:
                b_ot = tl.zeros([BM, D_TAIL], tl.float32)

        tl.debug_barrier()  # the columns read below were written by other threads for the previous query tile
        for i_n in range(0, Nk, BN):
            o_n = i_n + tl.arange(0, BN)  # [BN]
            b_k = load_rows(p_k, o_n, Nk, stride_kn, 0, D_MAIN, D)  # [BN, D_MAIN]
            b_s = dot(b_q, tl.trans(b_k), None, UPCAST)  # [BM, BN]
            if D_TAIL > 0:
                b_kt = load_rows(p_k, o_n, Nk, stride_kn, D_MAIN, D_TAIL, D)
                b_s = dot(b_qt, tl.trans(b_kt), b_s, UPCAST)
            b_x, factor = mask_scores(b_s, scale, p_mask, o_m, o_n, Nq, Nk, stride_mm, stride_mn, EVEN_N, ROW_MASK)

            b_top = tl.maximum(b_m, tl.max(b_x, 1) * factor)
            b_finite = tl.where(b_top == float("-inf"), 0.0, b_top)  # all masked so far: -inf - -inf is not a number
            b_p = tl.exp2(b_x * factor - b_finite[:, None])  # [BM, BN]
            b_rescale = tl.exp2(b_m - b_finite)
            b_l = b_l * b_rescale + tl.sum(b_p, 1)
            b_m = b_top

            if generated & (i_n < key_stop) & (i_n + BN > key_start):
                b_u = tl.where(m_generated, tl.exp2(b_m - pivot), 0.0)  # [BM]
                # A row too far above the pivot poisons every column: one test over columns then covers rows as well.
                b_u = tl.where(m_generated & ~(b_m - pivot <= HEADROOM), float("nan"), b_u)
                b_c = tl.sum(b_p * b_u[:, None], 0)  # [BN]
                m_n = (o_n >= key_start) & (o_n < key_stop)
                m_sound = ((b_c >= TINY) & (b_c <= HUGE)) | ~m_n
                b_col = pivot + tl.log2(b_c)
                if tl.min(m_sound.to(tl.int32), 0) == 0:
                    pivot = tl.max(tl.where(m_generated, b_m, float("-inf")), 0)
                    b_y = tl.where(m_generated[:, None], b_x, float("-inf"))
                    b_top = tl.max(b_y, 0) * factor  # [BN]
                    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
                    b_col = b_top + tl.log2(tl.sum(tl.exp2(b_y * factor - b_top[None, :]), 0))
                p_slot = p_col + (o_n - key_start)
                tl.store(p_slot, log2_add(tl.load(p_slot, mask=m_n, other=0.0), b_col), mask=m_n)

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
