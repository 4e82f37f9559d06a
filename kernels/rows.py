"""One query tile's walk along its keys, which both forwards share: the running softmax, the output, and how it ends."""

import triton
import triton.language as tl

from i2am.kernels.primitives import (
    LN2,
    dot_pv,
    dot_qk,
    load_head,
    logits,
    nearest,
    power_of_two,
    scale_head,
    store_head,
    zero_head,
)


@triton.jit
def soften(b_x, factor, b_m, b_l):
    """Take a key tile ``x [BM, BN]`` into the rows' softmax: ``p [BM, BN]``, and rescaling, maximum and sum ``[BM]``.

    Softmax is shift-invariant: the maximum is rounded, so that rescaling is exact and needs no exponential.
    """
    b_top = tl.maximum(b_m, nearest(tl.max(b_x, 1) * factor))
    b_finite = or_zero(b_top)
    b_p = tl.exp2(b_x * factor - b_finite[:, None])
    b_rescale = power_of_two(b_m - b_finite)
    return b_p, b_rescale, b_top, b_l * b_rescale + tl.sum(b_p, 1)


@triton.jit
def or_zero(b_m):
    """Return a maximum, 0 where all was masked: -inf - -inf is not a number."""
    return tl.where(b_m == float("-inf"), 0.0, b_m)


@triton.jit
def end_rows(
    b_o, b_m, b_l,  # of the whole walk; ``o`` is None where v is
    q, q_strides,
    k, k_strides,
    v, v_strides,
    mask, mask_strides,  # of one head
    out, out_strides,
    row_lse,  # of one head
    scale, i_b, i_h, first, Nq, Nk,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the rows' log-sum-exp and output.

    A masked pair's ``p`` is 0, but 0 times a value that is not finite is not a number: where the output is none and
    there is a mask, it is written again without what a row does not see. That costs the usual walk nothing.
    """
    o_m = first + tl.arange(0, BM)
    if v is not None:
        if mask is not None:
            # By way of memory that is the program's own: Triton 3.6 and 3.7 do not compile a product's reduction to
            # one number for tensor memory.
            tl.store(row_lse + o_m, broken_rows(b_o, D_TAIL), mask=o_m < Nq)
            tl.debug_barrier()
            found = tl.max(tl.load(row_lse + o_m, mask=o_m < Nq, other=0.0), 0)
            tl.debug_barrier()
            if found > 0.0:
                b_o = zero_head(BM, D_MAIN, D_TAIL)
                for i_n in tl.range(0, Nk, BN, num_stages=1):  # how many such values a row sees
                    o_n = i_n + tl.arange(0, BN)
                    b_v = load_head(v, v_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                    b_x, _ = logits(
                        tl.zeros([BM, BN], tl.float32), scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK
                    )
                    b_sees = tl.where(b_x == float("-inf"), 0.0, 1.0)
                    b_o = dot_pv(b_sees, find_broken(b_v, D_TAIL), b_o, D_TAIL, UPCAST)
                b_o = nan_where_any(b_o, D_TAIL)
                b_q = load_head(q, q_strides, i_b, i_h, first, Nq, BM, D, D_MAIN, D_TAIL, UNIT)
                for i_n in tl.range(0, Nk, BN, num_stages=1):
                    o_n = i_n + tl.arange(0, BN)
                    b_k = load_head(k, k_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                    b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
                    b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
                    b_p = tl.exp2(b_x * factor - or_zero(b_m)[:, None])
                    b_v = load_head(v, v_strides, i_b, i_h, i_n, Nk, BN, D, D_MAIN, D_TAIL, UNIT)
                    b_o = dot_pv(b_p, keep_finite(b_v, D_TAIL), b_o, D_TAIL, UPCAST)
        b_o = scale_head(b_o, 1.0 / tl.where(b_l == 0.0, 1.0, b_l), D_TAIL)
        store_head(out, out_strides, b_o, i_b, i_h, first, Nq, BM, D, D_MAIN, D_TAIL, OUT_UNIT)
    tl.store(row_lse + o_m, (b_m + tl.log2(b_l)) * LN2, mask=o_m < Nq)


# ------------------------------------------------------------------------------------------- values that are not finite


@triton.jit
def broken(b_x):
    """Return where ``x`` is NaN or infinite."""
    return ~(tl.abs(b_x.to(tl.float32)) < float("inf"))


@triton.jit
def broken_rows(b_x, D_TAIL: tl.constexpr):
    """Return ``[BLOCK]``: 1 if any number of a head's row is NaN or infinite, else 0."""
    b = tl.max(tl.where(broken(b_x[0]), 1.0, 0.0), 1)
    if D_TAIL > 0:
        b = tl.maximum(b, tl.max(tl.where(broken(b_x[1]), 1.0, 0.0), 1))
    return b


@triton.jit
def find_broken(b_x, D_TAIL: tl.constexpr):
    """Return a head's tile with 1 where a number is NaN or infinite, else 0."""
    if D_TAIL > 0:
        b = (tl.where(broken(b_x[0]), 1.0, 0.0).to(b_x[0].dtype), tl.where(broken(b_x[1]), 1.0, 0.0).to(b_x[1].dtype))
    else:
        b = (tl.where(broken(b_x[0]), 1.0, 0.0).to(b_x[0].dtype),)
    return b


@triton.jit
def keep_finite(b_x, D_TAIL: tl.constexpr):
    """Return a head's tile with 0 where a number is NaN or infinite."""
    if D_TAIL > 0:
        b = (tl.where(broken(b_x[0]), 0.0, b_x[0]), tl.where(broken(b_x[1]), 0.0, b_x[1]))
    else:
        b = (tl.where(broken(b_x[0]), 0.0, b_x[0]),)
    return b


@triton.jit
def nan_where_any(b_x, D_TAIL: tl.constexpr):
    """Return a head's tile with NaN where a count is not 0."""
    if D_TAIL > 0:
        b = (tl.where(b_x[0] > 0.0, float("nan"), 0.0), tl.where(b_x[1] > 0.0, float("nan"), 0.0))
    else:
        b = (tl.where(b_x[0] > 0.0, float("nan"), 0.0),)
    return b
