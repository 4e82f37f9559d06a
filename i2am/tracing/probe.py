"""``probe``: what a model's attention says of the reference while it is trained, with gradients.

::

    with i2am.probe(unet, reference=…, layers="up_blocks.*", reads=("expected", "mass")) as probe:
        noise = unet(latents, t, context).sample
        loss = F.mse_loss(noise, target)
        for read in probe.reads:
            loss = loss + 0.1 * i2am.losses.flow(read.expected, places(read.grid), mass=read.mass)
        loss.backward()

The model's own attention computes its output, bit for bit; the read-outs are computed beside it, in O(N) memory. The
same hooks and families as a tracer's say which call carries the reference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from i2am.families import Family, Request, TokenLayout
from i2am.losses import grid as coordinates
from i2am.ops import READS, Readouts, TokenSet, readouts
from i2am.references import Grid, LayerFilter, choose_layers
from i2am.tracing import References, _described, claims, hooks
from i2am.tracing.clock import StepInfo
from i2am.tracing.intercept import (
    AttentionCall,
    ForwardContext,
    LayerContext,
    close_context,
    frame_of_forward,
    open_context,
    refuse_compiled,
    running_context,
)
from i2am.tracing.layers import BlindLayerError, blind_message, watch_layer
from i2am.tracing.observe import as_autocast, padding_is_masked, take_awaited
from i2am.tracing.wrappers import inside

PROBED = tuple(name for name in READS if name != "columns")
OnGrids = Callable[[Grid, Grid | None], Tensor]

__all__ = ["LayerRead", "Probe", "probe"]


@dataclass(frozen=True)
class LayerRead:
    """Read-outs of one attention call about one reference, each an attribute: ``read.expected``.

    Attributes:
        layer: name of the attention module.
        reference: name of the reference.
        grid: ``(height, width)`` of the generated tokens.
        key_grid: ``(height, width)`` of the reference tokens; None: they have no 2-D layout.
        values: the :class:`i2am.ops.Readouts`.
    """

    layer: str
    reference: str
    grid: Grid
    key_grid: Grid | None
    values: Readouts

    def __getattr__(self, name: str) -> Tensor:
        value = getattr(self.values, name) if name in Readouts._fields else None
        if value is None:
            known = name in Readouts._fields
            raise AttributeError(f"{name!r} was not read: name it in reads=" if known else f"LayerRead has no {name!r}")
        found: Tensor = value
        return found


class Probe:
    """A model whose attention is read while it runs. Made by :func:`probe`; a context manager.

    Attributes:
        reads: one :class:`LayerRead` per layer and reference, of the last forward, in execution order.
    """

    entered = True  # a tracer does not take over in silence
    pipe = None

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        layers: LayerFilter,
        reads: Sequence[str],
        regions: OnGrids | None,
        pairs: OnGrids | None,
        backend: str | None,
    ):
        names = () if isinstance(reads, str) else tuple(reads)
        if not names or any(name not in PROBED for name in names):
            raise ValueError(f"reads must be a sequence of names among {', '.join(PROBED)}; got {reads!r}")
        for argument, value, needed in (("regions", regions, {"sram"}), ("pairs", pairs, {"log_p", "log_c"})):
            if (value is not None) != bool(needed & set(names)):
                raise ValueError(f"{argument}= goes with reads of {' or '.join(sorted(needed))}; got reads={names}")
        self.reads: list[LayerRead] = []
        self._names, self._regions, self._pairs, self._backend = names, regions, pairs, backend
        self._model = weakref.ref(model)
        self._family = family
        self._records = False
        self._batch = 0
        self._grids: dict[str, Grid | None] = {}
        try:  # a failure on the way in leaves nothing behind
            modules = family.layers()
            chosen = choose_layers(modules, layers)
            refuse_compiled(model)
            claims.claim(model, self)  # type: ignore[arg-type]
            for name in chosen:
                hooks.before(self, modules[name], self._again(name))
                watch_layer(self, family, name, modules[name])
                hooks.after(self, modules[name], self._done, always=True)
            for module, function, when in family.watch():
                (hooks.before if when == "before" else hooks.after)(self, module, function)
            hooks.before(self, model, self._begin)
            hooks.after(self, model, self._end, always=True)
        except BaseException:
            self.unpatch()
            raise

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    def unpatch(self) -> None:
        """Stop reading: no hook, no replaced function stays; ``reads`` remain. Idempotent."""
        model = self._model()
        if model is not None:
            hooks.remove(self, model)
            claims.release(model, self)  # type: ignore[arg-type]
        context = running_context()
        while context is not None and context.owner is self:
            close_context(context)
            context = running_context()

    # ------------------------------------------------------------------------------------------------------- hooks

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._family.begin(args, kwargs)
        self.reads = []
        self._records = torch.is_grad_enabled()
        self._batch = forward.latents.shape[0] * forward.frames
        open_context(self._context(self._attend, frame_of_forward()))

    def _context(
        self, attend: Callable[[ForwardContext, LayerContext, AttentionCall], Tensor | None], frame: FrameType
    ) -> ForwardContext:
        everything = slice(0, self._batch)  # training batches hold no unconditional half
        return ForwardContext(
            owner=self, attend=attend, batch=self._batch, conditional=everything, info=StepInfo(0), frame=frame
        )

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = running_context()
        if context is None or context.owner is not self or context.frame is not frame_of_forward():
            return
        close_context(context)
        if output is None:  # the forward itself failed
            self.reads = []
        elif context.blind:
            self.reads = []
            raise BlindLayerError(blind_message(context.blind))

    def _again(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return a hook for a layer that checkpointing runs again during backward, outside of the model's forward.

        The second run must make the same tensors as the first, or checkpointing refuses it.
        """

        def again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch._C._current_graph_task_id() == -1 or running_context() is not None:
                return
            context = self._context(self._attend_again, frame_of_forward())
            context.grid = self._grids.get(name)
            open_context(context)

        return again

    def _done(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = running_context()
        if context is not None and context.owner is self and context.attend == self._attend_again:
            close_context(context)

    # ------------------------------------------------------------------------------------------------------- reading

    def _attend(self, context: ForwardContext, layer: LayerContext, call: AttentionCall) -> Tensor | None:
        return self._attended(context, layer, call, keep=True)

    def _attend_again(self, context: ForwardContext, layer: LayerContext, call: AttentionCall) -> Tensor | None:
        return self._attended(context, layer, call, keep=False)

    def _attended(
        self, context: ForwardContext, layer: LayerContext, call: AttentionCall, *, keep: bool
    ) -> Tensor | None:
        """Read an attention call beside the model's own, whose output is returned."""

        def read(layout: TokenLayout) -> Tensor | None:
            found = self._read(layer, layout, call)
            if keep:
                self.reads.extend(found)
                self._grids[layer.name] = context.grid
            return None if call.value is None else call.run()

        return take_awaited(layer, call, read)

    def _read(self, layer: LayerContext, layout: TokenLayout, call: AttentionCall) -> list[LayerRead]:
        if self._records and not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {layer.name} runs without recording gradients inside a forward that records them, so that its "
                "read-outs would carry none: checkpoint with use_reentrant=False, or leave the layer out with layers="
            )
        if call.query.ndim != 4 or call.query.shape[0] != self._batch:
            raise ValueError(
                f"layer {layer.name}: attention on {tuple(call.query.shape)}, expected [B, H, N, d] with the model's "
                f"batch of {self._batch}"
            )
        if call.is_causal:
            raise ValueError(f"layer {layer.name}: causal attention is not supported")
        q, k = as_autocast(call.query), as_autocast(call.key)
        if call.enable_gqa:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        grids = [r.grid if isinstance(r.grid, tuple) else None for r in layout.references]
        places = [coordinates(g, device=q.device) for g in grids if g is not None]
        if "expected" in self._names and None in grids:
            raise ValueError(f"layer {layer.name}: its reference tokens have no grid, so there is no expected place")
        values = readouts(
            q,
            k,
            None,
            read=self._names,
            queries=layout.queries,
            keys=[_on_grid(r.tokens, k.shape[2], r.skip) for r in layout.references],
            scale=call.scale,
            attn_mask=padding_is_masked(call.attn_mask),
            regions=None if self._regions is None else self._regions(layout.grid, grids[0]).to(q.device),
            key_coordinates=places if "expected" in self._names else None,
            query_coordinates=coordinates(layout.grid, device=q.device) if "landing" in self._names else None,
            pairs=None if self._pairs is None else [self._pairs(layout.grid, g).to(q.device) for g in grids],
            backend=self._backend,
        )
        return [
            LayerRead(layer.name, reference.name, layout.grid, g, one)
            for reference, g, one in zip(layout.references, grids, values, strict=True)
        ]


def _on_grid(tokens: Any, length: int, skip: int) -> TokenSet:
    """Return a reference's tokens without the leading ones that are not on its grid (a class token)."""
    chosen = TokenSet.of(tokens, length, "keys")
    return chosen if skip == 0 else TokenSet.of(torch.arange(length)[chosen.index][skip:], length, "keys")


def probe(
    model: Any,
    *,
    reference: References = None,
    layers: LayerFilter = None,
    reads: Sequence[str] = ("expected", "mass"),
    regions: OnGrids | None = None,
    pairs: OnGrids | None = None,
    mode: Literal["reference", "self"] = "reference",
    backend: str | None = None,
) -> Probe:
    """Read a model's attention to the reference while it runs, with gradients.

    Args:
        model: a diffusers pipeline, or a bare denoiser (a UNet, a transformer); of one that is wrapped for training the
            module inside (``ddp.module``, ``accelerator.unwrap_model(…)``).
        reference, mode: as in :func:`i2am.trace` and :func:`i2am.patch_unet`.
        layers: which attention modules: a name, a glob pattern, several, or a predicate. None: all.
        reads: what to read of each call: names of ``i2am.ops.READS`` but "columns". Places are ``(y, x)`` in tokens.
            They are about the reference's tokens on its grid: a class token takes part in the softmax only.
        regions: (grid of the generated tokens, grid of the reference) → ``[R, h·w]`` weights, for "sram".
        pairs: the same grids → ``[M, 2]`` or ``[B, M, 2]`` known matches, for "log_p" and "log_c".
        backend: as in :func:`i2am.attention`.

    Returns:
        a :class:`Probe`, already reading; use it as a context manager. Where layers are checkpointed, call
        ``backward()`` inside it, and before the next forward.

    Raises:
        ValueError: nothing tells where the reference is, the model is traced, probed or compiled; an argument does not
            fit. Nothing changed.
    """
    from i2am.families.pipeline import read_pipeline
    from i2am.families.registry import read_model

    if mode not in ("reference", "self"):
        raise ValueError(f"mode must be 'reference' or 'self', got {mode!r}")
    request = Request(_described(reference), self_attention=mode == "self")
    if isinstance(model, nn.Module):
        denoiser = inside(model)
        family = read_model(denoiser, request, entry="patch_unet")
    else:
        traced = read_pipeline(model, request)
        denoiser, family = traced.model, traced.family
    return Probe(denoiser, family, layers=layers, reads=reads, regions=regions, pairs=pairs, backend=backend)
