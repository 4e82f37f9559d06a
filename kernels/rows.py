"""What both forwards share: where a program stands, the running softmax of a query tile's walk, and how it ends."""

import triton
import triton.language as tl

from i2am.kernels.primitives import (
    LN2,
    dot_add,
    dot_qk,
    load_head,
    logits,
    nearest,
    power_of_two,
    scale_head,
    store_head,
)


@triton.jit
def this_split(H):
    """Return where a program of the grid (B·H, splits of the queries) stands: ``i_bh, i_b, i_h, i_split, i_slot``.

    Its slot is the place of its partials among those of all splits.
    """
    i_bh, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    return i_bh, i_bh // H, i_bh % H, i_split, i_bh * tl.num_programs(1) + i_split


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
    there is a mask, it is written without what a row does not see. That costs the usual walk nothing.
    """
    o_m = first + tl.arange(0, BM)
    if v is not None:
        b_factor = 1.0 / tl.where(b_l == 0.0, 1.0, b_l)
        if mask is None:
            b_o = scale_head(b_o, b_factor, D_TAIL)
            store_head(out, out_strides, b_o, i_b, i_h, first, Nq, BM, D, D_MAIN, D_TAIL, OUT_UNIT)
        else:
            # By way of memory that is the program's own: Triton 3.6 and 3.7 do not compile a product's reduction to
            # one number for tensor memory.
            tl.store(row_lse + o_m, broken_rows(b_o, D_TAIL), mask=o_m < Nq)
            tl.debug_barrier()
            found = tl.max(tl.load(row_lse + o_m, mask=o_m < Nq, other=0.0), 0)
            tl.debug_barrier()
            if found > 0.0:
                weigh_seen(
                    b_m, b_factor, q, q_strides, k, k_strides, v, v_strides, mask, mask_strides, out, out_strides,
                    scale, i_b, i_h, first, Nq, Nk,
                    D, D_MAIN, D_TAIL, UNIT, OUT_UNIT, BM, BN, EVEN_N, ROW_MASK, UPCAST,
                )  # fmt: skip
            else:
                b_o = scale_head(b_o, b_factor, D_TAIL)
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
def weigh_seen(
    b_m, b_factor,  # the rows' maximum, and what their weights are multiplied by
    q, q_strides,
    k, k_strides,
    v, v_strides,
    mask, mask_strides,  # of one head
    out, out_strides,
    scale, i_b, i_h, first, Nq, Nk,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_TAIL: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_N: tl.constexpr, ROW_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the rows' output from finite values alone, and NaN where a row sees one that is not.

    Rare, so it may take its time but no register of the usual walk: a few features at once, in narrow tiles of keys.
    A descriptor knows one width and one height.
    """
    KEYS: tl.constexpr = BN if UNIT == 0 else 16
    WIDTH: tl.constexpr = D_MAIN if UNIT == 0 else 32
    o_m = first + tl.arange(0, BM)
    for first_d in range(0, D, WIDTH):
        o_d = first_d + tl.arange(0, WIDTH)
        b_o = tl.zeros([BM, WIDTH], tl.float32)
        for i_n in tl.range(0, Nk, KEYS, num_stages=1):  # how many values that are not finite a row sees
            o_n = i_n + tl.arange(0, KEYS)
            b_s = tl.zeros([BM, KEYS], tl.float32)
            b_x, _ = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
            b_v = load_features(v, v_strides, i_b, i_h, i_n, Nk, o_d, KEYS, WIDTH, D, UNIT)
            b_sees = tl.where(b_x == float("-inf"), 0.0, 1.0)
            b_o = dot_add(b_sees.to(b_v.dtype), tl.where(broken(b_v), 1.0, 0.0).to(b_v.dtype), b_o, UPCAST)
        b_o = tl.where(b_o > 0.0, float("nan"), 0.0)
        b_q = load_head(q, q_strides, i_b, i_h, first, Nq, BM, D, D_MAIN, D_TAIL, UNIT)
        for i_n in tl.range(0, Nk, KEYS, num_stages=1):
            o_n = i_n + tl.arange(0, KEYS)
            b_k = load_head(k, k_strides, i_b, i_h, i_n, Nk, KEYS, D, D_MAIN, D_TAIL, UNIT)
            b_s = dot_qk(b_q, b_k, D_TAIL, UPCAST)
            b_x, factor = logits(b_s, scale, mask, mask_strides, o_m, o_n, Nq, Nk, EVEN_N, ROW_MASK)
            b_p = tl.exp2(b_x * factor - or_zero(b_m)[:, None])
            b_v = load_features(v, v_strides, i_b, i_h, i_n, Nk, o_d, KEYS, WIDTH, D, UNIT)
            b_o = dot_add(b_p.to(b_v.dtype), tl.where(broken(b_v), 0.0, b_v), b_o, UPCAST)
        p = out + (i_b * out_strides[0] + i_h * out_strides[1]) * OUT_UNIT
        p = p + o_m.to(tl.int64)[:, None] * (out_strides[2] * OUT_UNIT) + o_d[None, :]
        b_o = (b_o * b_factor[:, None]).to(out.dtype.element_ty)
        tl.store(p, b_o, mask=(o_m < Nq)[:, None] & (o_d < D)[None, :])


@triton.jit
def load_features(
    x,  # [B, H, N, D]: a pointer, or a tensor descriptor of blocks [1, 1, BLOCK, WIDTH]
    x_strides, i_b, i_h, first, N,
    o_d,  # which features [WIDTH]; of a descriptor all
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Load some features of the rows ``first … first + BLOCK`` of one head; rows past ``N`` are zeros."""
    if UNIT == 0:
        b_x = tl.reshape(x.load([i_b.to(tl.int32), i_h.to(tl.int32), first, 0]), [BLOCK, WIDTH])
    else:
        o_n = first + tl.arange(0, BLOCK)
        p = x + (i_b * x_strides[0] + i_h * x_strides[1]) * UNIT
        p = p + o_n.to(tl.int64)[:, None] * (x_strides[2] * UNIT) + o_d[None, :]
        b_x = tl.load(p, mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)
    return b_x
