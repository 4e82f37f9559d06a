"""Attention that also says what it took from the reference: one op, three implementations.

``attention`` is for model authors; ``accumulate`` is what a tracer calls in place of a model's attention. Both go the
one way: check → token sets become spans → ``streaming`` (torch ops, any device) or the Triton kernels; under
``torch.compile`` by way of ``torch.ops.i2am.attention``. ``backend="reference"`` is the float64 twin of
:mod:`i2am.ops.naive`. Where a gradient is asked for, :mod:`i2am.ops.gradients` calls the same implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from i2am.ops import naive, streaming
from i2am.ops.checks import (
    BACKENDS,
    check_call,
    check_row_lse,
    check_sums,
    refuse_undifferentiable,
    runs_eagerly,
    triton_available,
    wants_gradient,
)
from i2am.ops.readouts import READS, readouts
from i2am.ops.results import AttentionOutput, Readouts, Sums
from i2am.ops.tokens import Selector, Span, TokenSet, gather, inverse, on_device

__all__ = [
    "BACKENDS",
    "READS",
    "AttentionOutput",
    "Readouts",
    "Selector",
    "Sums",
    "TokenSet",
    "accumulate",
    "attention",
    "readouts",
    "triton_available",
]


@overload
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
    read: None = None,
) -> AttentionOutput: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    queries: Selector = None,
    keys: Selector = None,
    backend: str | None = None,
    read: Sequence[str],
    regions: Tensor | None = None,
    key_coordinates: Tensor | None = None,
    query_coordinates: Tensor | None = None,
    columns: Selector = None,
    pairs: Tensor | None = None,
) -> Readouts: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    queries: Selector = None,
    keys: Selector = None,
    backend: str | None = None,
    read: Sequence[str] | None = None,
    regions: Tensor | None = None,
    key_coordinates: Tensor | None = None,
    query_coordinates: Tensor | None = None,
    columns: Selector = None,
    pairs: Tensor | None = None,
) -> AttentionOutput | Readouts:
    """Compute scaled dot-product attention with the bidirectional attribution of I2AM, without the ``Nq × Nk`` tensor.

    Everything that it returns is differentiable in q, k and v, and that in O(N) memory, too.

    Args:
        q: ``[B, H, Nq, d]``; any strides whose last is 1. float16, bfloat16, float32 (float64 off the GPU kernels).
        k: ``[B, H, Nk, d]``.
        v: ``[B, H, Nk, dv]``; with ``read`` also None: then no output is computed.
        scale: multiplies ``Q K^T``; default ``1/sqrt(d)``.
        attn_mask: broadcasts to ``[B, H, Nq, Nk]`` as in ``scaled_dot_product_attention``: bool (True = take part) or
            additive. Masked pairs take part in neither softmax.
        queries: the generated tokens among the queries: slice, bool mask or indices. Default: all.
        keys: the reference tokens among the keys, likewise.
        backend: "triton", "streaming", "reference"; None chooses Triton on a GPU and streaming elsewhere.
        read: what to read, and nothing else is computed: names of ``i2am.ops.READS``.
        regions: ``[R, Q]`` or ``[1 | B, R, Q]`` weights over the generated queries, for "sram".
        key_coordinates: ``[K, c]`` or ``[1 | B, K, c]`` numbers per reference key, for "expected".
        query_coordinates: ``[Q, c]`` or ``[1 | B, Q, c]`` numbers per generated query, for "landing".
        columns: a few of the reference keys, for "columns".
        pairs: ``[M, 2]`` or ``[1 | B, M, 2]`` of (generated query, reference key), for "log_p" and "log_c".

    Returns:
        :class:`AttentionOutput` with ``out, r2g, g2r, mass, row_lse, col_lse``; with ``read``, :class:`Readouts`.
        Statistics are float32; float64 from ``backend="reference"`` and for float64 inputs with ``read`` or gradients.

    Raises:
        ValueError: rank, shape, dtype, device, stride, mask or selector does not fit; the message says which.
        NotImplementedError: a derivative is asked for that is not given: forward mode, or of anything but q, k and v.
    """
    if read is not None:
        return readouts(
            q,
            k,
            v,
            read=read,
            queries=queries,
            keys=[keys],
            scale=scale,
            attn_mask=attn_mask,
            regions=regions,
            key_coordinates=None if key_coordinates is None else [key_coordinates],
            query_coordinates=query_coordinates,
            columns=None if columns is None else [columns],
            pairs=None if pairs is None else [pairs],
            backend=backend,
        )[0]
    for name, x in zip(
        ("regions", "key_coordinates", "query_coordinates", "columns", "pairs"),
        (regions, key_coordinates, query_coordinates, columns, pairs),
        strict=True,
    ):
        if x is not None:
            raise ValueError(f"{name}= is given, but read= names nothing that needs it")
    if v is None:
        raise ValueError("v is None: attention without an output needs read=, the names of what to read")
    scale, mask, backend = check_call(q, k, v, scale, attn_mask, backend)
    Q, K = TokenSet.of(queries, q.shape[2], "queries"), TokenSet.of(keys, k.shape[2], "keys")
    if backend == "reference":
        truth = naive.attention(q, k, v, scale=scale, mask=mask, queries=Q.index, keys=K.index)
        return truth._replace(out=truth.out.to(q.dtype))
    refuse_undifferentiable(q, k, v, attn_mask)
    if wants_gradient(q, k, v):
        asked = ("r2g", "g2r", "col_lse") if K.count == k.shape[2] else ("r2g", "g2r", "col_lse", "mass")
        (one,) = readouts(q, k, v, read=asked, queries=Q, keys=[K], scale=scale, attn_mask=attn_mask, backend=backend)
        assert one.out is not None  # there are values
        return AttentionOutput(one.out, *(getattr(one, name) for name in AttentionOutput._fields[1:]))
    B, H = q.shape[:2]
    sums = Sums(
        r2g=_zeros(q, B, H, Q.count),
        g2r=_zeros(q, B, H, K.count),
        mass=None if K.count == k.shape[2] else _zeros(q, B, H, Q.count),
    )
    out, row_lse, (col_lse,) = _dispatch(q, k, v, mask, scale, Q, [K], [sums], None, backend)
    assert out is not None  # there are values
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
    row_lse: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute one attention call and add its attribution to the running sums of every reference among its keys.

    Args:
        q, k, v, scale, attn_mask, queries, backend: as in :func:`attention`; ``v=None`` computes no output.
        sums: one :class:`Sums` per reference; its tensors are added into.
        keys: one selector per reference.
        regions: ``[1 | B, R, Q]`` float32 region weights over the generated queries, each summing to 1; needs
            ``Sums.sram``.
        row_lse: ``[B, H, Nq]`` natural, float32: the rows' log-sum-exp over all keys, where another kernel has computed
            the output (``v=None``); saves the GPU kernels a pass, other backends compute their own.

    Returns:
        ``(out | None, row_lse [B, H, Nq], col_lse)`` with one ``[B, H, K]`` column log-sum-exp per reference.

    Raises:
        ValueError: as :func:`attention`; also when the sums do not fit. Nothing has been added then.
        NotImplementedError: autograd records and q, k or v requires a gradient, or carries a forward-mode tangent.
    """
    if wants_gradient(q, k, v):
        raise NotImplementedError(
            "running sums carry no gradient, and q, k or v requires one: call accumulate() under torch.no_grad(), or "
            "i2am.attention(..., read=) for read-outs with gradients"
        )
    refuse_undifferentiable(q, k, v, attn_mask)
    scale, mask, backend = check_call(q, k, v, scale, attn_mask, backend)
    Q = TokenSet.of(queries, q.shape[2], "queries")
    Ks = [TokenSet.of(selector, k.shape[2], "keys") for selector in keys]
    check_sums(q, Q, Ks, sums, regions)
    if row_lse is not None:
        check_row_lse(q, v, row_lse)
    if backend == "reference":
        return _accumulate_naive(q, k, v, mask, scale, Q, Ks, sums, regions)
    return _dispatch(q, k, v, mask, scale, Q, Ks, sums, regions, backend, known=row_lse)


def _zeros(q: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=q.device)


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    Q: TokenSet,
    Ks: Sequence[TokenSet],
    sums: Sequence[Sums],
    regions: Tensor | None,
    backend: str,
    known: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Run an implementation, which knows spans only: tokens of sets with gaps are brought together first.

    ``known``: the row log-sum-exp of a call without values, where somebody has it.
    """
    (query_span,), query_order = gather([Q], q.shape[2])
    key_spans, key_order = gather(Ks, k.shape[2])
    if query_order is not None:
        order = on_device(query_order, q.device)
        q = q[:, :, order]
        mask = None if mask is None else mask[:, :, order]
    if key_order is not None:
        order = on_device(key_order, q.device)
        k, v = k[:, :, order], (None if v is None else v[:, :, order])
        mask = None if mask is None else mask[..., order]
    eager = runs_eagerly(q, k, v, mask, regions)
    if known is not None and backend == "triton" and eager:
        from i2am.ops import beside

        rows = known if query_order is None else known[:, :, on_device(query_order, q.device)]
        col_lses = beside.sweeps(
            q, k, rows, scale=scale, mask=mask, regions=regions, queries=query_span, keys=key_spans, sums=sums
        )
        return None, known, col_lses
    if eager:
        out, row_lse, col_lse = _run(q, k, v, mask, regions, scale, query_span, key_spans, sums, backend)
    else:
        out, row_lse, col_lse = _custom_op(
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
        back = on_device(inverse(query_order), q.device)
        out, row_lse = (None if v is None or out is None else out[:, :, back]), row_lse[:, :, back]
    first = min(start for start, _ in key_spans)
    return (None if v is None else out), row_lse, [col_lse[..., a - first : b - first] for a, b in key_spans]


def _accumulate_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    scale: float,
    Q: TokenSet,
    Ks: Sequence[TokenSet],
    sums: Sequence[Sums],
    regions: Tensor | None,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    lse = []
    for K, s in zip(Ks, sums, strict=True):
        p = naive.probabilities(q, k, scale=scale, mask=mask, queries=Q.index, keys=K.index)
        spent = p.rows[:, :, Q.index][..., K.index]  # [B, H, Q, K]
        s.r2g.add_(p.columns.mean(-1))
        s.g2r.add_(spent.mean(-2))
        if s.mass is not None:
            s.mass.add_(spent.sum(-1))
        if s.sram is not None and regions is not None:
            s.sram.add_(naive.sram(spent, regions))
        lse.append(p.col_lse)
    out = None if v is None else naive.output(p.rows, v, mask).to(q.dtype)
    return out, p.row_lse, lse


# ------------------------------------------------------------------------------------------------------- the custom op


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
    spans = list(zip(keys[::2], keys[1::2], strict=True))
    sums = Sums.bundled(r2g, g2r, mass, sram)
    out, row_lse, col_lse = _run(q, k, v, mask, regions, scale, (queries[0], queries[1]), spans, sums, backend)
    return q.new_empty(0) if out is None else out, row_lse, col_lse


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    scale: float,
    queries: Span,
    keys: Sequence[Span],
    sums: Sequence[Sums],
    backend: str,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Call the implementation: ``out`` or None, ``row_lse [B, H, Nq]``, ``col_lse`` over the hull of ``keys``."""
    if backend == "triton":
        from i2am.ops import triton

        implementation = triton.attention
    else:
        implementation = streaming.attention
    return implementation(q, k, v, scale=scale, mask=mask, regions=regions, queries=queries, keys=keys, sums=sums)


_custom_op = torch.ops.i2am.attention


@_attention.register_fake
def _(
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
    B, H, Nq, _ = q.shape
    out = q.new_empty(0) if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2)
    return (
        out,
        q.new_empty(B, H, Nq, dtype=torch.float32),
        q.new_empty(B, H, max(keys[1::2]) - min(keys[::2]), dtype=torch.float32),
    )
