"""Attention that also says what it took from the reference: one op, three implementations.

``attention`` is for model authors; ``accumulate`` is what a tracer calls in place of a model's attention. Both go the
one way: check → selectors become spans → ``torch.ops.i2am.attention`` → ``streaming`` (torch ops, any device) or the
Triton kernels. ``backend="reference"`` is the float64 twin of :mod:`i2am.ops.naive`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops import naive as reference
from i2am.ops import streaming
from i2am.ops.naive import AttentionOutput

BACKENDS = ("triton", "streaming", "reference")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_MAX_HEAD_DIM = 256

Selector = slice | Tensor | Sequence[int] | None


class Sums(NamedTuple):
    """Running sums of one reference, added into in place; float32, last stride 1.

    ``Q`` generated queries, ``K`` this reference's keys, ``R`` registered regions.
    """

    r2g: Tensor  # [B, H, Q]
    g2r: Tensor  # [B, H, K]
    mass: Tensor | None = None  # [B, H, Q]
    sram: Tensor | None = None  # [B, H, R, K]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    queries: Selector = None,
    keys: Selector = None,
    backend: str | None = None,
) -> AttentionOutput:
    """Scaled dot-product attention with the bidirectional attribution of I2AM, without the ``Nq × Nk`` tensor.

    Args:
        q: ``[B, H, Nq, d]``; any strides whose last is 1. float16, bfloat16, float32 (float64 off the GPU kernels).
        k: ``[B, H, Nk, d]``.
        v: ``[B, H, Nk, dv]``.
        scale: multiplies ``Q K^T``; default ``1/sqrt(d)``.
        attn_mask: broadcasts to ``[B, H, Nq, Nk]`` as in ``scaled_dot_product_attention``: bool (True = take part) or
            additive. Masked pairs take part in neither softmax.
        queries: the generated tokens among the queries: slice, bool mask or indices. Default: all.
        keys: the reference tokens among the keys, likewise.
        backend: "triton", "streaming", "reference"; None chooses Triton on a GPU and streaming elsewhere.

    Returns:
        :class:`AttentionOutput` with ``out, r2g, g2r, mass, row_lse, col_lse``; float32 statistics (float64 from
        ``backend="reference"``). Not differentiable.

    Raises:
        ValueError: rank, shape, dtype, device, stride, mask or selector does not fit; the message says which.
    """
    scale, mask, backend = _check(q, k, v, scale, attn_mask, backend)
    Q, K = Selection.of(queries, q.shape[2], "queries"), Selection.of(keys, k.shape[2], "keys")
    if backend == "reference":
        truth = reference.attention(q, k, v, scale=scale, mask=mask, queries=Q.index, keys=K.index)
        return truth._replace(out=truth.out.to(q.dtype))
    B, H = q.shape[:2]
    sums = Sums(
        r2g=_zeros(q, B, H, Q.count),
        g2r=_zeros(q, B, H, K.count),
        mass=None if K.count == k.shape[2] else _zeros(q, B, H, Q.count),
    )
    out, row_lse, (col_lse,) = _dispatch(q, k, v, mask, scale, Q, [K], [sums], None, backend)
    return AttentionOutput(out, sums.r2g, sums.g2r, sums.mass, row_lse, col_lse)


def accumulate(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    sums: Sequence[Sums],
    queries: Selector = None,
    keys: Sequence[Selector] = (None,),
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    regions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """One attention call that adds its attribution to the running sums of every reference among its keys.

    Args:
        q, k, v, scale, attn_mask, queries, backend: as in :func:`attention`; ``v=None`` computes no output.
        sums: one :class:`Sums` per reference; its tensors are added into.
        keys: one selector per reference.
        regions: ``[1 | B, R, Q]`` float32 region weights over the generated queries, each summing to 1; needs
            ``Sums.sram``.

    Returns:
        ``(out | None, row_lse [B, H, Nq], col_lse)`` with one ``[B, H, K]`` column log-sum-exp per reference.

    Raises:
        ValueError: as :func:`attention`; also when the sums do not fit. Nothing has been added then.
    """
    scale, mask, backend = _check(q, k, v, scale, attn_mask, backend)
    Q = Selection.of(queries, q.shape[2], "queries")
    Ks = [Selection.of(selector, k.shape[2], "keys") for selector in keys]
    _check_sums(q, Q, Ks, sums, regions)
    if backend == "reference":
        return _accumulate_reference(q, k, v, mask, scale, Q, Ks, sums, regions)
    out, row_lse, col_lse = _dispatch(q, k, v, mask, scale, Q, Ks, sums, regions, backend)
    return (None if v is None else out), row_lse, col_lse


# ---------------------------------------------------------------------------------------------------------- checks


def _check(q, k, v, scale, attn_mask, backend) -> tuple[float, Tensor | None, str]:
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(f"{name} must be a [B, H, N, d] tensor, got {_describe(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {_describe(x)}")
        if x.device != q.device or x.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must share device and dtype: q is {q.dtype} on {q.device}, "
                f"{name} is {x.dtype} on {x.device}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {x.stride(-1)} along the head dimension (strides {x.stride()}); it must be 1. "
                f"Copy it yourself with {name}.contiguous() if that is meant"
            )
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: batch, heads and head dim must agree")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {tuple(v.shape)} does not fit k {tuple(k.shape)}: batch, heads and length must agree")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale), _check_mask(q, k, attn_mask), _check_backend(q, v, backend)


def _check_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if mask.device != q.device:
        raise ValueError(f"attn_mask is on {mask.device}, q on {q.device}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool (True = take part) or additive floating point, got {mask.dtype}")
    full = (*q.shape[:3], k.shape[2])
    try:
        return mask.expand(full)
    except RuntimeError:
        raise ValueError(f"attn_mask {tuple(mask.shape)} does not broadcast to [B, H, Nq, Nk] = {full}") from None


def _check_backend(q: Tensor, v: Tensor | None, backend: str | None) -> str:
    if backend is None:
        fits = q.dtype in TRITON_DTYPES and q.shape[-1] <= TRITON_MAX_HEAD_DIM
        fits = fits and (v is None or v.shape[-1] == q.shape[-1])
        return "triton" if q.is_cuda and fits and triton_available() else "streaming"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton":
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
    return backend


def triton_available() -> bool:
    """True where the Triton package is installed (it is published for Linux only)."""
    return importlib.util.find_spec("triton") is not None


def _check_sums(q: Tensor, Q: Selection, Ks: list[Selection], sums: Sequence[Sums], regions: Tensor | None) -> None:
    if not Ks:
        raise ValueError("keys names no reference: pass one selector per reference")
    if len(sums) != len(Ks):
        raise ValueError(f"one Sums per reference is needed: {len(Ks)} key selectors, {len(sums)} sums")
    B, H = q.shape[:2]
    if len({s.mass is None for s in sums}) > 1:
        raise ValueError("mass is kept for every reference or for none")
    R = None
    if regions is not None:
        if regions.ndim != 3 or regions.shape[0] not in (1, B) or regions.shape[2] != Q.count:
            raise ValueError(
                f"regions must be [1 or {B}, R, {Q.count}] weights over the generated queries, got {_describe(regions)}"
            )
        R = regions.shape[1]
    for K, s in zip(Ks, sums, strict=True):
        wanted = {"r2g": (B, H, Q.count), "g2r": (B, H, K.count), "mass": (B, H, Q.count), "sram": (B, H, R, K.count)}
        for name, shape in wanted.items():
            x = getattr(s, name)
            if x is None and name in ("mass", "sram") and not (name == "sram" and R is not None):
                continue
            if x is None or tuple(x.shape) != shape or x.dtype != torch.float32 or x.device != q.device:
                raise ValueError(
                    f"sums.{name} must be float32 {shape} on {q.device}, got {'None' if x is None else _describe(x)}"
                )
            if x.stride(-1) != 1 and x.shape[-1] > 1:
                raise ValueError(f"sums.{name} must have stride 1 along its last axis, got strides {x.stride()}")


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"{type(x).__name__}: {x!r:.80}"


# -------------------------------------------------------------------------------------------------------- selectors


class Selection(NamedTuple):
    """A set of tokens: the span ``[start, stop)``, or ``tokens`` where the set has gaps."""

    start: int
    stop: int
    tokens: Tensor | None = None  # [n] int64, unique

    @property
    def count(self) -> int:
        return self.stop - self.start if self.tokens is None else self.tokens.numel()

    @property
    def index(self) -> slice | Tensor:
        return slice(self.start, self.stop) if self.tokens is None else self.tokens

    @classmethod
    def of(cls, selector: Selector, length: int, name: str) -> Selection:
        """Reads a slice, bool mask or indices over ``length`` tokens; refuses empty, repeated or outside ones."""
        if selector is None:
            return cls(0, length)
        if isinstance(selector, slice):
            chosen = range(length)[selector]
            if len(chosen) == 0:
                raise ValueError(f"{name}={selector} selects none of {length} tokens")
            if chosen.step == 1:
                return cls(chosen.start, chosen.stop)
            selector = torch.arange(length)[selector] if chosen.step > 0 else torch.tensor(list(chosen))
        tokens = torch.as_tensor(selector)
        if tokens.ndim != 1:
            raise ValueError(f"{name} must be a slice or a 1-D tensor, got {_describe(tokens)}")
        if tokens.dtype == torch.bool:
            if tokens.numel() != length:
                raise ValueError(f"{name} is a bool mask of {tokens.numel()} tokens, but there are {length}")
            tokens = tokens.nonzero().squeeze(1)
        if tokens.numel() == 0:
            raise ValueError(f"{name} selects none of {length} tokens")
        if tokens.is_floating_point() or tokens.is_complex():
            raise ValueError(f"{name} must hold integers, got {tokens.dtype}")
        tokens = tokens.to(torch.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= length:
            raise ValueError(f"{name} holds {low if low < 0 else high}, outside the valid range 0…{length - 1}")
        if torch.equal(tokens, torch.arange(low, high + 1, device=tokens.device)):
            return cls(low, high + 1)
        if tokens.unique().numel() != tokens.numel():
            raise ValueError(f"{name} holds the same token more than once")
        return cls(0, 0, tokens)


def _to_spans(selections: list[Selection], length: int, device) -> tuple[list[tuple[int, int]], Tensor | None]:
    """Spans for a list of token sets, and the token order that makes them contiguous (None: as they are)."""
    if all(s.tokens is None for s in selections):
        return [(s.start, s.stop) for s in selections], None
    chosen = torch.cat(
        [torch.arange(length)[s.index.cpu() if isinstance(s.index, Tensor) else s.index] for s in selections]
    )
    if chosen.unique().numel() != chosen.numel():
        raise ValueError("references given as index sets must not share tokens")
    rest = torch.ones(length, dtype=torch.bool)
    rest[chosen] = False
    order = torch.cat([chosen, rest.nonzero().squeeze(1)]).to(device)
    stops = torch.tensor([s.count for s in selections]).cumsum(0).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True)), order


# --------------------------------------------------------------------------------------------------------- dispatch


def _zeros(q: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=q.device)


def _dispatch(q, k, v, mask, scale, Q, Ks, sums, regions, backend):
    """Token sets with gaps are brought together first (softmax does not mind the order), so kernels see spans only."""
    (query_span,), query_order = _to_spans([Q], q.shape[2], q.device)
    key_spans, key_order = _to_spans(Ks, k.shape[2], q.device)
    if query_order is not None:
        q = q[:, :, query_order]
        mask = None if mask is None else mask[:, :, query_order]
    if key_order is not None:
        k, v = k[:, :, key_order], (None if v is None else v[:, :, key_order])
        mask = None if mask is None else mask[..., key_order]
    out, row_lse, col_lse = torch.ops.i2am.attention(
        q,
        k,
        v,
        mask,
        regions,
        scale,
        list(query_span),
        [edge for span in key_spans for edge in span],
        [s.r2g for s in sums],
        [s.g2r for s in sums],
        [s.mass for s in sums if s.mass is not None],
        [s.sram for s in sums if s.sram is not None],
        backend,
    )
    if query_order is not None:
        back = torch.empty_like(query_order).scatter_(0, query_order, torch.arange(len(query_order), device=q.device))
        out, row_lse = (out if v is None else out[:, :, back]), row_lse[:, :, back]
    first = min(start for start, _ in key_spans)
    return out, row_lse, [col_lse[..., start - first : stop - first] for start, stop in key_spans]


def _accumulate_reference(q, k, v, mask, scale, Q, Ks, sums, regions):
    lse = []
    for K, s in zip(Ks, sums, strict=True):
        p = reference.probabilities(q, k, scale=scale, mask=mask, queries=Q.index, keys=K.index)
        spent = p.rows[:, :, Q.index][..., K.index]  # [B, H, Q, K]
        s.r2g.add_(p.columns.mean(-1))
        s.g2r.add_(spent.mean(-2))
        if s.mass is not None:
            s.mass.add_(spent.sum(-1))
        if s.sram is not None:
            s.sram.add_(reference.sram(spent, regions))
        lse.append(p.col_lse)
    out = None if v is None else (p.rows @ v.double()).to(q.dtype)
    return out, p.row_lse, lse


@torch.library.custom_op("i2am::attention", mutates_args=("r2g", "g2r", "mass", "sram"))
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    scale: float,
    queries: list[int],
    keys: list[int],
    r2g: list[Tensor],
    g2r: list[Tensor],
    mass: list[Tensor],
    sram: list[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from i2am.kernels import attention as implementation
    else:
        implementation = streaming
    return implementation.attention(
        q,
        k,
        v,
        scale=scale,
        mask=mask,
        regions=regions,
        queries=(queries[0], queries[1]),
        keys=list(zip(keys[::2], keys[1::2], strict=True)),
        r2g=r2g,
        g2r=g2r,
        mass=mass,
        sram=sram,
    )


@_attention.register_fake
def _(q, k, v, mask, regions, scale, queries, keys, r2g, g2r, mass, sram, backend):
    B, H, Nq, _ = q.shape
    out = q.new_empty(0) if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2)
    return (
        out,
        q.new_empty(B, H, Nq, dtype=torch.float32),
        q.new_empty(B, H, max(keys[1::2]) - min(keys[::2]), dtype=torch.float32),
    )
