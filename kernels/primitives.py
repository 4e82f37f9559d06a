"""What the kernels do to one tile: load it, multiply it, scale and mask its logits, add up its columns.

A head's features are one tile of ``D_MAIN``, and a second of ``D_TAIL`` where ``D`` is no power of two: 40 = 32 + 8 of
16, so that nothing is padded in memory. Only this file knows of the two; a kernel hands them on as one tuple. A tensor
descriptor loads one tile of the next power of two: the hardware fills it up with zeros.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)  # README: numerics
ROUNDING = tl.constexpr(1.5 * 2**23)
DEAD = tl.constexpr(-1.0e38)


# -------------------------------------------------------------------------------------------------------------- heads


@triton.jit
def load_head(
    x,  # [B, H, N, D]: a pointer, or a tensor descriptor of blocks [1, 1, BLOCK, D_MAIN]
    x_strides,  # of B, H and N, in units of UNIT elements
    i_b,
    i_h,
    first,
    N,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    UNIT: tl.constexpr,
    CLAMP: tl.constexpr = False,
):
    """Load the rows ``first … first + BLOCK`` of one head: ``([BLOCK, D_MAIN], [BLOCK, D_TAIL])``.

    Rows past ``N`` are zeros or, with CLAMP, the last one again (a descriptor ignores CLAMP).
    """
    if UNIT == 0:
        b_x = x.load([i_b.to(tl.int32), i_h.to(tl.int32), first, 0])
        b = (tl.reshape(b_x, [BLOCK, D_MAIN]),)
    else:
        o_n = first + tl.arange(0, BLOCK)
        if CLAMP:
            o_n = tl.minimum(o_n, N - 1)
        p = x + (i_b * x_strides[0] + i_h * x_strides[1]) * UNIT + o_n.to(tl.int64)[:, None] * (x_strides[2] * UNIT)
        o_d = tl.arange(0, D_MAIN)
        m_n = (o_n < N)[:, None]
        b_main = tl.load(p + o_d[None, :], mask=m_n & (o_d < D)[None, :], other=0.0)
        if D_TAIL > 0:
            o_t = D_MAIN + tl.arange(0, D_TAIL)
            b = (b_main, tl.load(p + o_t[None, :], mask=m_n & (o_t < D)[None, :], other=0.0))
        else:
            b = (b_main,)
    return b


@triton.jit
def store_head(
    x,  # [B, H, N, D]
    x_strides,
    b_x,  # ([BLOCK, D_MAIN], [BLOCK, D_TAIL])
    i_b,
    i_h,
    first,
    N,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_TAIL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Store rows of one head, rounded to the dtype of ``x``; the inverse of :func:`load_head` for pointers."""
    o_n = first + tl.arange(0, BLOCK)
    p = x + (i_b * x_strides[0] + i_h * x_strides[1]) * UNIT + o_n.to(tl.int64)[:, None] * (x_strides[2] * UNIT)
    o_d = tl.arange(0, D_MAIN)
    m_n = (o_n < N)[:, None]
    tl.store(p + o_d[None, :], b_x[0].to(x.dtype.element_ty), mask=m_n & (o_d < D)[None, :])
    if D_TAIL > 0:
        o_t = D_MAIN + tl.arange(0, D_TAIL)
        tl.store(p + o_t[None, :], b_x[1].to(x.dtype.element_ty), mask=m_n & (o_t < D)[None, :])


@triton.jit
def zero_head(BLOCK: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr):
    """Return float32 zeros in the shape of a loaded head."""
    if D_TAIL > 0:
        b = (tl.zeros([BLOCK, D_MAIN], tl.float32), tl.zeros([BLOCK, D_TAIL], tl.float32))
    else:
        b = (tl.zeros([BLOCK, D_MAIN], tl.float32),)
    return b


@triton.jit
def scale_head(b_x, b_factor, D_TAIL: tl.constexpr):
    """Multiply every row of ``x`` by its factor ``[BLOCK]``."""
    if D_TAIL > 0:  # noqa: SIM108 (the tuples differ in length, and only one of them is compiled)
        b = (b_x[0] * b_factor[:, None], b_x[1] * b_factor[:, None])
    else:
        b = (b_x[0] * b_factor[:, None],)
    return b


@triton.jit
def dot(b_x, b_y, UPCAST: tl.constexpr):
    """Return ``x @ y`` in float32; the interpreter multiplies the raw bits of bfloat16, hence UPCAST there."""
    if UPCAST:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision="ieee")


@triton.jit
def dot_add(b_x, b_y, b_acc, UPCAST: tl.constexpr):
    """Return ``x @ y + acc``."""
    if UPCAST:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def dot_qk(b_q, b_k, D_TAIL: tl.constexpr, UPCAST: tl.constexpr):
    """Return ``q kᵀ`` of two heads, ``[BM, BN]``."""
    b_s = dot(b_q[0], tl.trans(b_k[0]), UPCAST)
    if D_TAIL > 0:
        b_s = dot_add(b_q[1], tl.trans(b_k[1]), b_s, UPCAST)
    return b_s


@triton.jit
def dot_pv(b_p, b_v, b_o, D_TAIL: tl.constexpr, UPCAST: tl.constexpr):
    """Return ``o + p v``; ``p [BM, BN]`` is rounded to the dtype of ``v``."""
    b_p = b_p.to(b_v[0].dtype)
    if D_TAIL > 0:
        b = (dot_add(b_p, b_v[0], b_o[0], UPCAST), dot_add(b_p, b_v[1], b_o[1], UPCAST))
    else:
        b = (dot_add(b_p, b_v[0], b_o[0], UPCAST),)
    return b


# ------------------------------------------------------------------------------------------------------------- logits


@triton.jit
def logits(
    b_s,  # [BM, BN] q kᵀ
    scale,
    mask,  # one head's [Nq, Nk], or None
    mask_strides,  # of B, H, rows and columns
    o_m,
    o_n,
    M,
    N,
    EVEN_N: tl.constexpr,
    ROW_MASK: tl.constexpr,
):
    """Return ``x [BM, BN], factor`` with ``logits · log2(e) = x · factor``; ``x`` is -inf where a pair takes no part.

    The product with the scale is left to the exponential's multiply-add, unless a bias stands between the two.
    """
    b_x = b_s
    factor = scale
    if mask is None:
        if not EVEN_N:  # a zero-padded key is not a masked one
            b_x = tl.where((o_n < N)[None, :], b_x, float("-inf"))
    else:
        m = (o_n < N)[None, :]
        p = mask + o_n.to(tl.int64)[None, :] * mask_strides[3]
        if ROW_MASK:
            m = m & (o_m < M)[:, None]
            p = p + o_m.to(tl.int64)[:, None] * mask_strides[2]
        if mask.dtype.element_ty.is_int1():
            b_x = tl.where(tl.load(p, mask=m, other=0).to(tl.int1), b_x, float("-inf"))
        else:
            b_bias = tl.load(p, mask=m, other=float("-inf")).to(tl.float32)
            b_x = b_x * scale + tl.maximum(b_bias * LOG2E, LOWEST, propagate_nan=tl.PropagateNan.ALL)
            b_x = tl.where(b_bias == float("-inf"), float("-inf"), b_x)  # whatever the product is
            factor = 1.0
    return b_x, factor


# --------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def halve_rows(b_x, ROWS: tl.constexpr, PAIRS: tl.constexpr, LEFT: tl.constexpr):
    """Add the upper half of the rows of ``x [2, ROWS, PAIRS, LEFT]`` to the lower half.

    The split asks for both halves in one thread, so the tile changes hands once, through shared memory, and all
    further halvings cost one addition a value: no butterfly of shuffles, and each sum lies in a single thread.
    """
    b_x = tl.reshape(b_x, [2, 2, ROWS // 2, PAIRS, LEFT])
    b_upper, b_lower = tl.split(tl.permute(b_x, [0, 2, 3, 4, 1]))
    return b_upper + b_lower


@triton.jit
def sum_columns(b_x, BM: tl.constexpr, BN: tl.constexpr, LANE_ROWS: tl.constexpr):
    """Return ``Σ_i x[i, :]`` of ``x [BM, BN]``, the result of a product.

    LANE_ROWS: the rows that lie in different lanes and warps, 8 a warp for NVIDIA's products before tensor memory; 0
    leaves it to the compiler.
    """
    if LANE_ROWS == 0 or BM < 2 * LANE_ROWS:
        b = tl.sum(b_x, 0)
    else:
        b_r = tl.sum(tl.reshape(b_x, [BM // (2 * LANE_ROWS), LANE_ROWS // 8, 2, 8, BN]), 2)  # within a thread
        # Every thread is to have a pair of columns, as a product leaves them. The threads that are left then divide the
        # rows: LEFT of them, side by side, meet at the end.
        LEFT: tl.constexpr = 8 * LANE_ROWS // BN
        ROWS: tl.constexpr = LANE_ROWS // LEFT
        b_r = tl.reshape(tl.sum(b_r, 0), [ROWS, LEFT, BN // 2, 2])
        b_r = tl.permute(b_r, [3, 0, 2, 1])  # [2, ROWS, BN / 2, LEFT]
        if ROWS >= 32:
            b_r = halve_rows(b_r, 32, BN // 2, LEFT)
        if ROWS >= 16:
            b_r = halve_rows(b_r, 16, BN // 2, LEFT)
        if ROWS >= 8:
            b_r = halve_rows(b_r, 8, BN // 2, LEFT)
        if ROWS >= 4:
            b_r = halve_rows(b_r, 4, BN // 2, LEFT)
        if ROWS >= 2:
            b_r = halve_rows(b_r, 2, BN // 2, LEFT)
        b = tl.reshape(tl.permute(tl.sum(tl.reshape(b_r, [2, BN // 2, LEFT]), 2), [1, 0]), [BN])
    return b


@triton.jit
def nearest(b_x):
    """Round to an integer, without the conversion that would take the exponentials' unit."""
    return (b_x + ROUNDING) - ROUNDING


@triton.jit
def power_of_two(b_x):
    """Return ``2^x`` of integers up to 127, from the bits of a float: no exponential. 0 from 2^-127 downwards."""
    b_bits = (tl.maximum(b_x, -127.0) + ROUNDING).to(tl.int32, bitcast=True)
    return ((b_bits << 23) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def log2_add(b_x, b_y):
    """Return ``log2(2^x + 2^y)``, -inf where both are."""
    b_top = tl.maximum(b_x, b_y)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top + tl.log2(tl.exp2(b_x - b_top) + tl.exp2(b_y - b_top))
