"""The differentiable op: attention, its attribution and further read-outs, O(N) memory forwards and backwards.

``P`` is the softmax over all keys, ``C`` the one over the generated queries 𝒬; 𝒦 is one reference's keys. Every
read-out is linear in P or C. What is a vector per *normalised* row or column is its own side, the rest crosses:

================  ==========================================  =======================================
                  own side                                    cross side
================  ==========================================  =======================================
P                 ``out, mass, expected, entropy, row_lse``   ``g2r, sram`` (per key)
C                 ``landing, col_lse`` (per key)              ``r2g`` (per query)
================  ==========================================  =======================================

With ``S`` the logits, L and M the row and column log-sum-exps, the chain rule gives::

    dS = P ∘ (dP − δ_i) + C ∘ (dC − ε_j)
    dP_ij = dout_i·V_j + dexpected_i·x_j + dmass_i + W_i·dG_j − dentropy_i ln P_ij      δ_i = Σ_j P_ij dP_ij − dL_i
    dC_ij = dr2g_i / |𝒦| + y_i·dlanding_j                                             ε_j = Σ_i C_ij dC_ij − dM_j

``dP`` and ``dC`` are products of a few columns, so each side is one flash backward (:func:`i2am.ops.sweeps.backward`).
The own sides' shares of δ and ε are known from the outputs; those of the cross sides take one sweep. Where their range
allows, both sides are one: ``C = P ∘ u wᵀ`` with ``u = exp(L − c)``, ``w = exp(c − M)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from i2am.ops import sweeps
from i2am.ops.backward import backward
from i2am.ops.forward import BASE, Outputs, Setting, forward


@torch.library.custom_op("i2am::attention_maps", mutates_args=())
def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    scale: float,
    queries: list[int],
    keys: list[int],
    reads: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return :class:`Outputs`: the functional op, which carries the gradient.

    Args:
        q, k, v, mask: as in :func:`i2am.attention`, the mask of full shape.
        regions: ``[1 | B, R, Q]`` weights, each summing to 1.
        x: ``[1 | B, hull, c]`` coordinates of the keys.
        y: ``[1 | B, Q, c]`` coordinates of the generated queries.
        scale: multiplies ``q kᵀ``.
        queries: start and stop of 𝒬.
        keys: start and stop of each reference, one after the other.
        reads: names of :data:`READS`, with commas between (custom ops take no list of strings).
        backend: of the fused op.
    """
    with torch.autocast(q.device.type, enabled=False):  # the model's own autocast must not reach the statistics
        found = forward(q, k, v, mask, regions, x, y, Setting.of(scale, queries, keys), reads.split(","), backend)
    return Outputs(found.out, *(field.contiguous() for field in found[1:]))


@attention_maps.register_fake
def _(q, k, v, mask, regions, x, y, scale, queries, keys, reads, backend):  # type: ignore[no-untyped-def]
    (B, H, Nq, _), n, Q, reads = q.shape, len(keys) // 2, queries[1] - queries[0], reads.split(",")
    K = max(keys[1::2]) - min(keys[::2])
    fused, column = BASE & set(reads), BASE & set(reads) or {"landing", "col_lse"} & set(reads)

    def new(asked: object, *shape: int) -> Tensor:
        empty: Tensor = q.new_empty(shape if asked else (0,), dtype=sweeps.statistic(q.dtype))
        return empty

    fields = Outputs(
        out=q.new_empty(0) if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2),
        row_lse=new(True, B, H, Nq),
        col_lse=new(column, B, H, K),
        r2g=new(fused, n, B, H, Q),
        g2r=new(fused, B, H, K),
        mass=new("mass" in reads, n, B, H, Q),
        sram=new(fused and regions is not None, B, H, 0 if regions is None else regions.shape[1], K),
        expected=new(x is not None, n, B, H, Q, 0 if x is None else x.shape[2]),
        landing=new("landing" in reads, B, H, K, 0 if y is None else y.shape[2]),
        entropy=new("entropy" in reads, B, H, Q),
    )
    return tuple(fields)


@torch.library.custom_op("i2am::attention_maps_backward", mutates_args=())
def attention_maps_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    regions: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    scale: float,
    queries: list[int],
    keys: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (empty without v). ``kept`` and ``grads`` in the order of :class:`Outputs`."""
    setting = Setting.of(scale, queries, keys)
    named = dict(zip(Outputs._fields, grads, strict=True))
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = backward(q, k, v, mask, regions, x, y, Outputs(*kept), named, setting)
    return dq.contiguous(), dk.contiguous(), q.new_empty(0) if dv is None else dv.contiguous()


@attention_maps_backward.register_fake
def _(q, k, v, mask, regions, x, y, kept, grads, scale, queries, keys):  # type: ignore[no-untyped-def]
    shapes = [q.shape, k.shape, (0,) if v is None else v.shape]
    return tuple(q.new_empty(shape) for shape in shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward needs: the inputs and vectors, nothing of size Nq × Nk."""
    ctx.set_materialize_grads(False)
    *tensors, scale, queries, keys, _, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.setting = scale, queries, keys


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[:7], saved[7:]
    grads = tuple(g if g is not None and g.numel() else None for g in grads)  # compiled code fills in empty ones
    if all(g is None for g in grads):
        return (None,) * 12
    dq, dk, dv = attention_maps_backward(*tensors, list(kept), list(grads), *ctx.setting)
    return dq, dk, None if tensors[2] is None else dv, *(None,) * 9


def _no_second(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "i2am's read-outs have no second derivative (a gradient penalty, create_graph=True or a Hessian needs one): "
        "compute that term with backend='reference'"
    )


attention_maps.register_autograd(_gradient, setup_context=_keep)
attention_maps_backward.register_autograd(_no_second)
