"""What both passes do to one tile: load it, multiply it, scale and mask its logits.

Head dims that are no power of two are split in two, ``D = D_MAIN + live part of D_TAIL`` (40 = 32 + 8 of 16), so that
nothing is padded in memory. ``D_TAIL`` is 0 where ``D_MAIN`` is enough.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # a finite bias never becomes -inf by its change of base
ROUNDING = tl.constexpr(1.5 * 2**23)  # floats of this size are integers, which their last bits hold
DEAD = tl.constexpr(-1.0e38)  # a log-sum-exp below: every pair was masked, by -inf or by finfo.min


@triton.jit
def load_rows(p_x, o_n, N, stride_n, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Features ``FIRST … FIRST + WIDTH`` of the rows ``o_n`` of ``x [N, D]``; zeros outside."""
    o_d = FIRST + tl.arange(0, WIDTH)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m, other=0.0)  # [len(o_n), WIDTH]


@triton.jit
def store_rows(p_x, b_x, o_n, N, stride_n, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The inverse of :func:`load_rows`, in the dtype of ``x``."""
    o_d = FIRST + tl.arange(0, WIDTH)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    tl.store(p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def dot(b_x, b_y, b_acc, UPCAST: tl.constexpr):
    """``x @ y + acc``; the interpreter multiplies the raw bits of bfloat16, hence UPCAST there."""
    if UPCAST:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    if b_acc is None:  # Triton 3.3 takes no None for the accumulator, and compiles what follows a return in an `if`
        return tl.dot(b_x, b_y, input_precision="ieee")
    else:
        return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def mask_scores(
    b_s, scale, p_mask, o_m, o_n, Nq, Nk, stride_mm, stride_mn, EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr
):
    """``x, factor`` with ``logits · log2(e) = x · factor``; ``x`` is -inf where a pair takes no part.

    The product with the scale is left to the exponential's multiply-add, unless a bias stands between the two.
    """
    b_x = b_s
    factor = scale
    if p_mask is None:
        if not EVEN_N:  # a zero-padded key is not a masked one
            b_x = tl.where((o_n < Nk)[None, :], b_x, float("-inf"))
    else:
        m = (o_n < Nk)[None, :]
        p = p_mask + o_n.to(tl.int64)[None, :] * stride_mn
        if ROW_MASK:
            m = m & (o_m < Nq)[:, None]
            p = p + o_m.to(tl.int64)[:, None] * stride_mm
        if p_mask.dtype.element_ty.is_int1():
            b_x = tl.where(tl.load(p, mask=m, other=0).to(tl.int1), b_x, float("-inf"))
        else:
            b_bias = tl.load(p, mask=m, other=float("-inf")).to(tl.float32)
            b_bias = tl.where(b_bias == float("-inf"), b_bias, tl.maximum(b_bias * LOG2E, LOWEST))
            b_x = b_x * scale + b_bias
            factor = 1.0
    return b_x, factor  # [BM, BN], scalar


@triton.jit
def scores(
    b_q,  # [BM, D_MAIN]
    b_qt,  # [BM, D_TAIL], unused where D_TAIL is 0
    p_k,  # [Nk, D]
    p_mask,  # [Nq, Nk] or None
    o_m,
    o_n,
    scale,
    Nq,
    Nk,
    stride_kn,
    stride_mm,
    stride_mn,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    EVEN_N: tl.constexpr,
    ROW_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """:func:`mask_scores` of the queries at hand and the keys ``o_n``."""
    b_k = load_rows(p_k, o_n, Nk, stride_kn, 0, D_MAIN, D)  # [BN, D_MAIN]
    b_s = dot(b_q, tl.trans(b_k), None, UPCAST)  # [BM, BN]
    if D_TAIL > 0:
        b_kt = load_rows(p_k, o_n, Nk, stride_kn, D_MAIN, D_TAIL, D)  # [BN, D_TAIL]
        b_s = dot(b_qt, tl.trans(b_kt), b_s, UPCAST)
    return mask_scores(b_s, scale, p_mask, o_m, o_n, Nq, Nk, stride_mm, stride_mn, EVEN_N, ROW_MASK)


@triton.jit
def nearest(b_x):
    """The nearest integer, without the conversion that would take the exponentials' unit."""
    return (b_x + ROUNDING) - ROUNDING


@triton.jit
def power_of_two(b_x):
    """``2^x`` of integers up to 127, from the bits of a float: no exponential. 0 from 2^-127 downwards."""
    b_bits = (tl.maximum(b_x, -127.0) + ROUNDING).to(tl.int32, bitcast=True)
    return ((b_bits << 23) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def log2_add(b_x, b_y):
    """``log2(2^x + 2^y)``, -inf where both are."""
    b_top = tl.maximum(b_x, b_y)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top + tl.log2(tl.exp2(b_x - b_top) + tl.exp2(b_y - b_top))
