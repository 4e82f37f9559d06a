"""What an attention call must satisfy before anything is computed: shapes, dtypes, strides, mask, backend, sums."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from i2am.ops.results import Sums
from i2am.ops.tokens import TokenSet

BACKENDS = ("triton", "streaming", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256
PLAIN = (Tensor, torch.nn.Parameter)  # not a subclass, which may have dispatch of its own
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looked for once: a search costs 50 µs


def check_call(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float | None, attn_mask: Tensor | None, backend: str | None
) -> tuple[float, Tensor | None, str]:
    """Return the scale, the mask expanded to ``[B, H, Nq, Nk]`` and the backend of a call, or refuse it.

    Raises:
        ValueError: what does not fit, with its shape, dtype, device or strides.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None or name != "v":
            _check_tensor(name, x, q)
    B, H, Nq, d = q.shape
    if k.shape[:2] != (B, H) or k.shape[3] != d:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: batch, heads and head dim must agree")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} does not fit k {tuple(k.shape)}: batch, heads and length must agree")
    if scale is None:
        scale = 1.0 / math.sqrt(d)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    mask = None if attn_mask is None else _check_mask(attn_mask, q.device, (B, H, Nq, k.shape[2]))
    return float(scale), mask, choose_backend(q, v, backend)


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Return whether nobody compiles, fakes, watches, transforms or differentiates a call on these tensors.

    Then the implementation may be called as it is; else it must go by the custom op, which costs 100 µs a call.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    graded = torch.is_grad_enabled()
    return all(x is None or (type(x) in PLAIN and not (graded and x.requires_grad)) for x in tensors)


def _check_tensor(name: str, x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4:
        raise ValueError(f"{name} must be a [B, H, N, d] tensor, got {describe(x)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {describe(x)}")
    if x.device != q.device or x.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share device and dtype: q is {q.dtype} on {q.device}, {name} is {x.dtype} on {x.device}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} has stride {x.stride(-1)} along the head dimension (strides {x.stride()}); it must be 1. "
            f"Copy it yourself with {name}.contiguous() if that is meant"
        )


def check_row_lse(q: Tensor, v: Tensor | None, row_lse: Tensor) -> None:
    """Refuse a log-sum-exp that is not that of the call's rows. Raises ValueError."""
    if v is not None:
        raise ValueError("row_lse= is what a kernel that computed the output knows: give v=None with it")
    if row_lse.shape != q.shape[:3] or row_lse.dtype != torch.float32 or row_lse.device != q.device:
        raise ValueError(
            f"row_lse must be [B, H, Nq] = {tuple(q.shape[:3])}, torch.float32 on {q.device}, got "
            f"{tuple(row_lse.shape)}, {row_lse.dtype} on {row_lse.device}"
        )


def _check_mask(mask: Tensor, device: torch.device, full: tuple[int, int, int, int]) -> Tensor:
    if mask.device != device:
        raise ValueError(f"attn_mask is on {mask.device}, q on {device}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool (True = take part) or additive floating point, got {mask.dtype}")
    try:
        return mask.expand(full)
    except RuntimeError:
        raise ValueError(f"attn_mask {tuple(mask.shape)} does not broadcast to [B, H, Nq, Nk] = {full}") from None


def choose_backend(q: Tensor, v: Tensor | None, backend: str | None) -> str:
    """Return the backend's name: ``backend`` if it can run this call, Triton on a GPU, streaming elsewhere.

    Raises:
        ValueError: the backend is unknown or cannot run this call; the message says why and names one that can.
    """
    if backend is None:
        fits = q.is_cuda and q.dtype in TRITON_DTYPES and q.shape[-1] <= TRITON_MAX_HEAD_DIM
        fits = fits and (v is None or v.shape[-1] == q.shape[-1])
        return "triton" if fits and triton_available() else "streaming"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton":
        _check_triton(q, v)
    return backend


def _check_triton(q: Tensor, v: Tensor | None) -> None:
    if not triton_available():
        raise ValueError("backend='triton', but triton is not installed (it exists for Linux only)")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs GPU tensors, got {q.device}; set TRITON_INTERPRET=1 before the first import "
            "of triton to interpret the kernels on CPU (slow), or use backend='streaming'"
        )
    if q.dtype not in TRITON_DTYPES:
        raise ValueError(f"backend='triton' takes float16, bfloat16 or float32, got {q.dtype}; use 'streaming'")
    if q.shape[-1] > TRITON_MAX_HEAD_DIM or (v is not None and v.shape[-1] != q.shape[-1]):
        dims = f"q {q.shape[-1]}" + ("" if v is None else f", v {v.shape[-1]}")
        raise ValueError(
            f"backend='triton' takes one head dim for q, k and v, at most {TRITON_MAX_HEAD_DIM}; got {dims}; "
            "use 'streaming'"
        )


def triton_available() -> bool:
    """Return whether the Triton package is installed (it is published for Linux only)."""
    return _TRITON_INSTALLED


def check_sums(
    q: Tensor, queries: TokenSet, keys: Sequence[TokenSet], sums: Sequence[Sums], regions: Tensor | None
) -> None:
    """Refuse running sums or regions that do not fit a call.

    Raises:
        ValueError: which of them, and the shape, dtype and device that is wanted.
    """
    if not keys:
        raise ValueError("keys names no reference: pass one selector per reference")
    if len(sums) != len(keys):
        raise ValueError(f"one Sums per reference is needed: {len(keys)} key selectors, {len(sums)} sums")
    if len(sums) > 1 and len({s.mass is None for s in sums}) > 1:
        raise ValueError("mass is kept for every reference or for none")
    (B, H), Q = q.shape[:2], queries.count
    R = 0 if regions is None else _check_regions(regions, B, Q)
    for K, s in zip(keys, sums, strict=True):
        _check_sum("r2g", s.r2g, (B, H, Q), q.device)
        _check_sum("g2r", s.g2r, (B, H, K.count), q.device)
        if s.mass is not None:
            _check_sum("mass", s.mass, (B, H, Q), q.device)
        if regions is not None:
            _check_sum("sram", s.sram, (B, H, R, K.count), q.device)
        elif s.sram is not None:
            raise ValueError(f"sums.sram is kept, but no regions are given; it is {describe(s.sram)}")


def _check_regions(regions: Tensor, B: int, Q: int) -> int:
    if regions.ndim != 3 or regions.shape[0] not in (1, B) or regions.shape[2] != Q:
        raise ValueError(
            f"regions must be [1 or {B}, R, {Q}] weights over the generated queries, got {describe(regions)}"
        )
    return regions.shape[1]


def _check_sum(name: str, x: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if x is None or x.shape != shape or x.dtype != torch.float32 or x.device != device:
        got = "None" if x is None else describe(x)
        raise ValueError(f"sums.{name} must be float32 {shape} on {device}, got {got}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"sums.{name} must have stride 1 along its last axis, got strides {x.stride()}")


def describe(x: object) -> str:
    """Return what an argument is, for a message: dtype, shape and device of a tensor, else type and beginning."""
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"{type(x).__name__}: {x!r:.80}"


# ---------------------------------------------------------------------------------------------------------- gradients


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd is recording and one of ``tensors`` requires a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_undifferentiable(q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None) -> None:
    """Refuse derivatives that are not given: rather an error than a zero.

    Raises:
        NotImplementedError: a tensor carries a forward-mode tangent, or the mask requires a gradient.
    """
    refuse_gradient("attn_mask", mask)
    if torch.compiler.is_compiling():  # its graphs hold neither tangents nor wrapped tensors
        return
    for name, x in (("q", q), ("k", k), ("v", v), ("attn_mask", mask)):
        if x is None:
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a forward-mode tangent (torch.func.jvp, jacfwd, forward_ad), and i2am's attention has "
                "reverse-mode gradients only: use backward() or torch.autograd.grad, or backend='reference'"
            )
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise NotImplementedError(
                f"{name} is inside torch.func (grad, vjp, jacrev, vmap), for which i2am's attention has no rule: use "
                "backward() or torch.autograd.grad, or backend='reference'"
            )


def refuse_gradient(name: str, x: Tensor | None) -> None:
    """Refuse a gradient with respect to what gets none. Raises NotImplementedError."""
    if wants_gradient(x):
        raise NotImplementedError(
            f"{name} requires a gradient, and only q, k and v get one: pass {name}.detach(), or use "
            "backend='reference', which materialises the attention"
        )
