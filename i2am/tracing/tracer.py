"""``Tracer``: hooks on, one forward after the other, hooks off."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from i2am.families import Family
from i2am.maps import AttributionMaps
from i2am.maps.sram import MAX_REGIONS, Region, Weights, region_weights, several
from i2am.ops import BACKENDS, Selection, Sums, accumulate
from i2am.references import Carried, Grid, LayerFilter, choose_layers
from i2am.tracing.clock import Clock, SchedulerClock, TimestepClock, read_timestep
from i2am.tracing.guidance import Guidance
from i2am.tracing.intercept import (
    Call,
    Carries,
    RunningLayer,
    Scope,
    close_scope,
    eager,
    frame_of_forward,
    open_scope,
    refuse_compiled,
    running_scope,
)
from i2am.tracing.qk import Record, RecordOptions, check_limit, logger, mask_between, run_on_shapes
from i2am.tracing.sums import Recorder

OUTPUTS = ("i2am", "model")
PADDING = -1e4  # an additive mask this low means "no such key"


class BlindLayerError(RuntimeError):
    """A reference-carrying layer ran, but its attention went past the seam: its maps would be missing."""


_traced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_traced_lock = threading.Lock()


class Tracer:
    """A model being traced, and the running sums. Made by :func:`trace` and :func:`patch_unet`."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        clock: Clock,
        time_groups: int,
        layers: LayerFilter,
        guidance: str | int,
        guidance_parts=lambda: (None, None),
        output: str,
        backend: str | None,
        sram: Mapping[str, Region] | None = None,
        canvas: Grid | None = None,
        pixels: int = 1,
        record: Mapping[str, Any] | None = None,
    ):
        self._undo = ExitStack()
        with ExitStack() as undo:  # a failure on the way in leaves nothing behind
            if isinstance(clock, SchedulerClock):
                undo.callback(clock.close)
            if output not in OUTPUTS:
                raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
            if backend is not None and backend not in BACKENDS:
                raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
            self._family = family
            self._clock = clock
            self._guidance = Guidance(guidance)
            self._guidance_parts = guidance_parts
            self._output = output
            self._backend = backend
            self._recorder = Recorder(time_groups)
            self._record = Record(RecordOptions(**(record or {})))
            if self._record.options.record and isinstance(clock, TimestepClock):
                raise ValueError(
                    "record= needs num_steps= or scheduler=, so that its size is known before the first step"
                )
            self._sram = _Registered(sram or {}, canvas, pixels)
            self._scope: Scope | None = None
            self._measuring = False
            modules = family.layers()
            chosen = choose_layers(modules, layers)
            self._defaults = set(chosen) if layers is not None else {n for n in chosen if family.by_default(n)}
            refuse_compiled(model)
            _claim(model, undo)
            undo.callback(self._close)
            for name in chosen:
                for handle in self._watch_layer(name, modules[name]):
                    undo.callback(handle.remove)
            for handle in family.watch():
                undo.callback(handle.remove)
            for handle in (
                model.register_forward_pre_hook(eager(self._begin), with_kwargs=True),
                model.register_forward_hook(eager(self._end), always_call=True),
            ):
                undo.callback(handle.remove)
            self._undo = undo.pop_all()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *exc) -> None:
        self.unpatch()

    def unpatch(self) -> None:
        """Stops tracing: no hook, no replaced function stays; what was recorded remains readable. Idempotent."""
        self._undo.close()

    def reset(self) -> None:
        """Forgets what was recorded and goes on tracing: call it between runs of different batches or sizes."""
        self._recorder.clear()
        self._record = Record(self._record.options)
        self._guidance.restart()
        self._clock.restart()
        self._sram.restart()

    def maps(self) -> AttributionMaps:
        """The maps of all that was recorded since the start or the last ``reset``, detached from the model (on CPU).

        Raises:
            ValueError: nothing was recorded.
        """
        tracks = self._recorder.tracks.values()
        if not tracks:
            raise ValueError(
                "nothing was recorded: no reference-carrying attention has run since tracing began (run the model "
                "inside the trace; an IP-Adapter of scale 0 is skipped by diffusers)"
            )
        return AttributionMaps.of(
            tracks,
            default=self._defaults,
            canvas=self._sram.canvas,
            regions=self._sram.names,
            entries=self._record.entries,
        )

    @property
    def record_bytes(self) -> int:
        """What the recorded queries and keys take so far."""
        return self._record.nbytes

    # ------------------------------------------------------------------------------------------------------- hooks

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._measuring:  # a shape-only forward of _measured
            return
        self._close()
        _refuse_faster_cache(model)
        forward = self._family.begin(args, kwargs)
        self._sram.see(forward.grid or tuple(forward.latents.shape[-2:]))
        timestep = read_timestep(forward.timestep)
        moment = self._clock.read(timestep, self._recorder.time_groups)
        if not self._guidance.counts(forward.latents, timestep, self._clock.stepped, self._family.conditional_call):
            return
        conditional = self._guidance.conditional(
            forward.latents, *self._guidance_parts(), by_calls=self._family.conditional_call is not None
        )
        scope = Scope(
            attend=self._attend,
            batch=forward.latents.shape[0] * forward.frames,
            conditional=slice(conditional.start * forward.frames, conditional.stop * forward.frames),
            moment=moment,
            frame=frame_of_forward(),
        )
        if self._record.options.record and moment.first:
            nbytes = self._measured(model, args, kwargs, scope)
            if nbytes is not None:
                check_limit(self._record.options, nbytes, moment, self._recorder.time_groups, have=self._record.nbytes)
        self._open(scope)

    def _open(self, scope: Scope) -> None:
        open_scope(scope)
        self._scope = scope

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self._measuring:
            return
        scope = self._scope
        self._close()
        if scope is None or output is None:  # the forward itself failed
            self._record.drop()
            return
        if scope.blind:
            self._record.drop()
            raise BlindLayerError(_blind(scope.blind))
        self._record.flush()

    def _close(self) -> None:
        if self._scope is not None:
            close_scope(self._scope)
            self._scope = None

    def _measured(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], scope: Scope) -> int | None:
        """Bytes that one forward will record, from a run on shapes alone; None where the model can't be run so."""
        sizes: dict[object, int] = {}

        def attend(scope: Scope, layer: RunningLayer, carries: Carries, call: Call) -> Tensor | None:
            carried = carries(call) if callable(carries) else carries
            if carried is None:
                return call.run()
            part = call.on(scope.conditional)
            B, H, Nq, d = part.query.shape
            width = d * (self._record.options.record_dtype or _autocast(part.query).dtype).itemsize
            Q = Selection.of(carried.queries, Nq, "queries").count
            sizes[layer.name] = B * H * Q * width
            for reference in carried.references:
                sizes[layer.name, reference.name] = B * H * (reference.count(part.key.shape[2]) * (width + 4) + Q * 4)
            return None if call.value is None else call.query.new_empty(*call.query.shape[:-1], call.value.shape[-1])

        if _keeps_state(model):
            logger.warning(
                "the record's size is not known beforehand (the model is offloaded, or has a cache); its limit is "
                "watched as it grows"
            )
            return None
        self._open(replace(scope, attend=attend, frame=sys._getframe()))
        self._measuring = True
        try:
            run_on_shapes(model, args, kwargs)
        except Exception as error:
            logger.warning("the record's size is not known beforehand (%s); its limit is watched as it grows", error)
            return None
        finally:
            self._measuring = False
            self._close()
        return sum(sizes.values())

    def _watch_layer(self, name: str, module: nn.Module):
        def enter(module, args, kwargs):
            scope = running_scope()
            if scope is not None and scope is self._scope:
                layer = RunningLayer(name, grid=scope.grid, computed=not parts)
                scope.layers.append(layer)
                self._family.enter(layer, module, args, kwargs)

        def leave(module, args, output):
            scope = self._scope
            if scope is None or not scope.layers or scope.layers[-1].name != name:
                return
            layer = scope.layers.pop()
            if layer.carries is None or not layer.computed:
                return
            call = None if output is None else self._family.leave(layer, module)
            if call is None:
                scope.blind.append(name)
            else:
                scope.attend(scope, layer, layer.carries, call)

        def computed(*_):
            scope = self._scope
            if scope is not None and scope.layers and scope.layers[-1].name == name:
                scope.layers[-1].computed = True

        parts = _parts(module)
        for part in parts:
            yield part.register_forward_pre_hook(eager(computed))
        yield module.register_forward_pre_hook(eager(enter), with_kwargs=True)
        yield module.register_forward_hook(eager(leave), always_call=True)

    def _attend(self, scope: Scope, layer: RunningLayer, carries: Carries, call: Call) -> Tensor | None:
        """An attention call: adds it to the sums; its output, the fused op's or the model's own."""
        carried = carries(call) if callable(carries) else carries
        if carried is None:
            return call.run()
        if call.value is None:
            return self._observe(scope, layer, carried, call)
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
        if self._output == "model" or call.dropout_p != 0 or trained:
            self._observe(scope, layer, carried, replace(call, value=None))
            return call.run()
        return _among_others(self._observe(scope, layer, carried, call), call, scope.conditional)

    def _observe(self, scope: Scope, layer: RunningLayer, carried: Carried, call: Call) -> Tensor | None:
        """Adds one attention call to the sums; its output for the conditional samples, where the call has values."""
        part = call.on(scope.conditional)
        mask = _padding_is_masked(part.attn_mask)
        q, k, v = (None if x is None else _autocast(x) for x in (part.query, part.key, part.value))
        self._check_call(layer, carried, call, scope)
        if call.enable_gqa:
            k, v = (None if x is None else x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        queries = Selection.of(carried.queries, q.shape[2], "queries").count
        group = scope.moment.group
        regions = self._sram.weights(carried.grid)
        tracks = self._recorder.open(layer.name, carried, q, k, queries, len(self._sram.names))
        sums = [track.at(group) for track in tracks]
        if carried.rolls is not None:
            rolled = _RolledBack(carried, scope.conditional, k.shape[2], sums)
            sums = rolled.sums
        with torch.no_grad():
            out, row_lse, col_lse = accumulate(
                q,
                k,
                v,
                sums=sums,
                queries=carried.queries,
                keys=[reference.tokens for reference in carried.references],
                scale=call.scale,
                attn_mask=mask,
                regions=None if regions is None else regions.to(q.device),
                backend=self._backend,
            )
            if carried.rolls is not None:
                rolled.add()
        for track in tracks:
            track.counts[group] += 1
        if self._record.options.wants(scope.moment):
            self._keep(layer, carried, q, k, mask, call.scale, row_lse, col_lse, group)
        return out

    def _keep(self, layer, carried, q, k, mask, scale, row_lse, col_lse: list[Tensor], group: int) -> None:
        """Records one call's generated queries and reference keys."""
        queries = Selection.of(carried.queries, q.shape[2], "queries").index
        references = {}
        for reference, lse in zip(carried.references, col_lse, strict=True):
            keys = Selection.of(reference.tokens, k.shape[2], "keys").index
            references[reference.name] = {"k": k[:, :, keys], "col_lse": lse}
            if mask is not None:
                references[reference.name]["mask"] = mask_between(mask, queries, keys, layer.name)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self._record.add(layer.name, group, scale, q[:, :, queries], row_lse[:, :, queries], references)

    def _check_call(self, layer: RunningLayer, carried: Carried, call: Call, scope: Scope) -> None:
        if call.query.ndim != 4 or call.query.shape[0] != scope.batch:
            raise ValueError(
                f"layer {layer.name}: attention on {tuple(call.query.shape)}, expected [B, H, N, d] with the model's "
                f"batch of {scope.batch}"
            )
        if call.is_causal:
            raise ValueError(f"layer {layer.name}: causal attention is not supported")
        count = Selection.of(carried.queries, call.query.shape[2], "queries").count
        if carried.grid[0] * carried.grid[1] != count:
            raise ValueError(f"layer {layer.name}: {count} generated queries do not fill its grid {carried.grid}")


class _RolledBack:
    """Sums of one call over a reference's keys, to be added over what these keys were made of.

    Args:
        carried: with ``rolls [B, K, X]``.
        samples: the conditional ones.
        keys: number of keys of the call.
        totals: where to add, over ``X``.
    """

    def __init__(self, carried: Carried, samples: slice, keys: int, totals: Sequence[Sums]):
        self._rolls = [None if roll is None else roll[samples] for roll in carried.rolls]
        self._totals = totals
        self.sums = [
            total if roll is None else _without_keys(total, reference.count(keys))
            for total, roll, reference in zip(totals, self._rolls, carried.references, strict=True)
        ]

    def add(self) -> None:
        for total, one, roll in zip(self._totals, self.sums, self._rolls, strict=True):
            if roll is not None:
                total.g2r.add_(torch.einsum("bhk,bkx->bhx", one.g2r, roll.to(one.g2r)))
                if total.sram is not None:
                    total.sram.add_(torch.einsum("bhrk,bkx->bhrx", one.sram, roll.to(one.sram)))


def _without_keys(total: Sums, keys: int) -> Sums:
    """Fresh sums over ``keys`` keys; those over queries stay where they are."""
    sram = None if total.sram is None else total.sram.new_zeros(*total.sram.shape[:-1], keys)
    return total._replace(g2r=total.g2r.new_zeros(*total.g2r.shape[:-1], keys), sram=sram)


class _Registered:
    """The registered regions of a tracer, as weights on each layer's grid.

    Args:
        regions: name → point or mask.
        canvas: where points are given; None: known from the first forward, ``pixels`` per latent pixel.
    """

    def __init__(self, regions: Mapping[str, Region], canvas: Grid | None, pixels: int):
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"at most {MAX_REGIONS} regions can be registered, got {len(regions)}")
        self.names = list(regions)
        self._given = canvas
        self._regions = list(regions.values())
        self._pixels = pixels
        self.restart()
        if canvas is not None or not any(isinstance(r, tuple) for r in self._regions):
            self._read(canvas or (1, 1))  # what can be refused now is

    def restart(self) -> None:
        """Forgets the sizes of earlier runs."""
        self.canvas = self._given
        self._on_grid: dict[Grid, Tensor] = {}
        self._all: Weights | None = None

    def see(self, latent: Grid) -> None:
        """A forward is about to run on latents of this size."""
        if self.canvas is None:
            self.canvas = (latent[0] * self._pixels, latent[1] * self._pixels)
        if self._all is None:
            self._read(self.canvas)

    def weights(self, grid: Grid) -> Tensor | None:
        """``[1 | B, R, h·w]`` on a layer's grid; None without regions."""
        if not self.names:
            return None
        if grid not in self._on_grid:
            self._on_grid[grid] = self._all(grid)
        return self._on_grid[grid]

    def _read(self, canvas: Grid) -> None:
        self._all = several([region_weights(region, canvas) for region in self._regions])


def _among_others(out: Tensor, call: Call, samples: slice) -> Tensor:
    """``out [b, H, N, d]`` of the chosen samples, in its place among the model's own output for the others.

    In memory heads come after tokens, as torch's kernels leave them: processors take a view of it.
    """
    before, after = slice(0, samples.start), slice(samples.stop, call.query.shape[0])
    parts = [
        call.on(before).run() if samples.start else None,
        out,
        call.on(after).run() if after.start < after.stop else None,
    ]
    parts = [part.transpose(1, 2) for part in parts if part is not None]
    return (parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)


def _padding_is_masked(mask: Tensor | None) -> Tensor | None:
    """An additive mask whose padding is -inf: diffusers adds -10000, which a softmax over queries would not notice.

    A row with nothing but padding keeps it, so that the output stays the model's.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    padding = mask <= PADDING
    return mask.masked_fill(padding & ~padding.all(-1, keepdim=True), float("-inf"))


def _autocast(x: Tensor) -> Tensor:
    """What ``scaled_dot_product_attention`` would see under the autocast that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _claim(model: nn.Module, undo: ExitStack) -> None:
    """Registers ``model`` as traced until ``undo`` runs."""
    with _traced_lock:
        if model in _traced:
            raise ValueError(f"this {type(model).__name__} is being traced already: unpatch() the other tracer first")
        _traced.add(model)
    undo.callback(_traced.discard, model)


def _refuse_faster_cache(model: nn.Module) -> None:
    """It leaves the unconditional half of the batch out of some calls and extrapolates."""
    hooks = getattr(getattr(model, "_diffusers_hook", None), "hooks", {})
    if "faster_cache_denoiser" in hooks:
        raise ValueError(
            "FasterCache changes the batch from call to call, so that the conditional samples are not known: "
            "disable_cache() before tracing (PyramidAttentionBroadcast and FirstBlockCache can be traced)"
        )


def _keeps_state(model: nn.Module) -> bool:
    """Whether caches or offloading hook into the forward: a run on shapes would leave fake tensors behind in them."""
    return any(
        hasattr(module, "_hf_hook") or getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        for module in model.modules()
    )


def _parts(attention: nn.Module) -> list[nn.Module]:
    """What an attention module calls on its way, unless a cache answers in its place."""
    children = [m[0] if isinstance(m, nn.ModuleList) and len(m) else m for m in attention.children()]
    return [m for m in children if not isinstance(m, nn.ModuleList)]


def _blind(layers: list[str]) -> str:
    shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return (
        f"{shown}: ran with the reference, but through no attention function that can be seen (torch's, a backend of "
        "diffusers, xformers'), so nothing was recorded. Switch off attention slicing (disable_attention_slicing), set "
        "the default processors (set_attn_processor(AttnProcessor2_0())), or call i2am.attention inside the module"
    )
