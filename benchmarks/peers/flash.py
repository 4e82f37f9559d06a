"""Flash attention's forward in the form of Triton's tutorial, written afresh: the baselines of the static costs."""

import triton
import triton.language as tl


@triton.jit
def flash_kernel(
    q,  # [B·H, N, D]
    k,  # [B·H, N, D]
    v,  # [B·H, N, D]
    out,  # [B·H, N, D]
    lse,  # [B·H, N]
    scale,
    N,
    stride_h,
    stride_n,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``O = softmax(scale · Q Kᵀ) V`` for sequences of whole tiles. Grid: (query tiles, B·H)."""
    i_m, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    b_q = tl.load(q + i_h * stride_h + o_m[:, None] * stride_n + o_d[None, :])  # [BM, D]
    k += i_h * stride_h + o_n[:, None] * stride_n + o_d[None, :]
    v += i_h * stride_h + o_n[:, None] * stride_n + o_d[None, :]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, D], tl.float32)
    for _ in range(0, N, BN):
        b_k = tl.load(k)  # [BN, D]
        b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
        b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_top[:, None])
        b_rescale = tl.exp2(b_m - b_top)
        b_l = b_l * b_rescale + tl.sum(b_p, 1)
        b_v = tl.load(v)  # [BN, D]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None])
        b_m = b_top
        k += BN * stride_n
        v += BN * stride_n
    tl.store(lse + i_h * N + o_m, b_m + tl.log2(b_l))
    out += i_h * stride_h + o_m[:, None] * stride_n + o_d[None, :]
    tl.store(out, (b_o / b_l[:, None]).to(out.dtype.element_ty))


@triton.jit
def flash_tma_kernel(
    q,  # [B·H·N, D] descriptors, by whole tiles
    k,
    v,
    out,
    lse,  # [B·H, N]
    scale,
    N,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """:func:`flash_kernel` with tensor descriptors, as the tutorial has it for GPUs that load tiles by themselves."""
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    b_q = q.load([i_h * N + i_m * BM, 0])  # [BM, D]
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, D], tl.float32)
    for i_n in range(0, N, BN):
        b_s = tl.dot(b_q, tl.trans(k.load([i_h * N + i_n, 0])))  # [BM, BN]
        b_top = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_top[:, None])
        b_rescale = tl.exp2(b_m - b_top)
        b_l = b_l * b_rescale + tl.sum(b_p, 1)
        b_v = v.load([i_h * N + i_n, 0])  # [BN, D]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_rescale[:, None])
        b_m = b_top
    tl.store(lse + i_h * N + o_m, b_m + tl.log2(b_l))
    out.store([i_h * N + i_m * BM, 0], (b_o / b_l[:, None]).to(out.dtype))
