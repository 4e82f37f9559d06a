"""Attention modules of any code base, by what they are made of: ``to_q``, ``to_k`` and ``heads`` (CompVis' ``ldm``).

Their attention is often two einsums, where no call can be intercepted. Hooks on the projections see the very queries
and keys instead, and attribution is computed beside the module's own output. A call that does go through
``scaled_dot_product_attention`` or xformers is intercepted as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from i2am.families import Family, ForwardInputs, Hooked, TokenLayout
from i2am.families.arguments import named_arguments, tensors_of
from i2am.references import Grid, LayerFilter, Reference, choose_layers
from i2am.tracing.intercept import AttentionCall, LayerContext, running_context, running_layer

TIMESTEPS = ("timesteps", "timestep", "t", "time", "sigma", "sigmas", "noise_level")
LATENTS = ("sample", "hidden_states", "x", "latents", "noisy_latents", "noisy_sample")
HEADS = ("heads", "num_heads", "n_heads")
AFTER_PROJECTION = (
    "norm_q",
    "norm_k",
    "q_norm",
    "k_norm",
    "rotary_emb",
    "rope",
)  # q and k are not yet what is compared

Describe = Callable[[str, int, Grid], Reference | Sequence[Reference]]
Inputs = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Tensor, Tensor | float]]
Mask = Callable[[nn.Module, dict[str, Any]], Tensor | None]


@dataclass
class Projected:
    """Inputs of one attention module and their projections so far."""

    arguments: dict[str, Any]  # of the module, by name
    outputs: dict[str, Tensor] = field(default_factory=dict)  # projection → what it gave
    inputs: dict[str, Tensor] = field(default_factory=dict)  # projection → what it was given


class Parts:
    """Projections of an attention module, which hooks see only for as long as they stay in their places."""

    def __init__(self, module: nn.Module, paths: Sequence[str]):
        self._module = module
        self._own = {path: module.get_submodule(path) for path in paths}

    def check(self, layer: str) -> None:
        """Refuse a module whose projections are others now. Raises ValueError."""
        for path, own in self._own.items():
            if not _has(self._module, path) or self._module.get_submodule(path) is not own:
                raise ValueError(
                    f"layer {layer}: its {path} was replaced after tracing began (a LoRA added or unloaded?), so that "
                    "what it gives is not seen: unpatch(), and trace the model as it is now"
                )


class AttentionModules(Family):
    """Attention modules inside ``model`` that have query and key projections and a number of heads.

    Args:
        model: the module whose forward is one evaluation.
        where: which attention modules; None: all. One whose queries and keys come from the same tensor is only taken
            when its very name is given.
        reference: which of their keys encode the reference: references, or a function of (layer, number of keys, grid
            of the generated tokens).
        grid: of the generated tokens where no module around the attention is given a feature map of that size: a
            function of (layer, number of tokens).
        mask: the attention mask of a module, a function of (module, its arguments by name); None: an argument ``mask``
            as CompVis' modules take it, and no other.
        inputs: latents and timestep of a forward, a function of (args, kwargs).
        projections: names of the query and key projection, or their paths ("processor.to_k_ip").
    """

    def __init__(
        self,
        model: nn.Module,
        where: LayerFilter,
        reference: Sequence[Reference] | Describe,
        *,
        grid: Callable[[str, int], Grid] | None = None,
        mask: Mask | None = None,
        inputs: Inputs | None = None,
        projections: tuple[str, str] = ("to_q", "to_k"),
    ):
        self.model = model
        self._reference = reference if callable(reference) else lambda *_: reference
        self._grid = grid
        self._mask = mask or compvis_mask
        self._read_inputs = inputs or self._guess_inputs
        self._projections = projections
        found = attention_modules(model, projections)
        self._modules = {name: found[name] for name in choose_layers(found, where)}
        self._parts = {name: Parts(module, projections) for name, module in self._modules.items()}
        named = [where] if isinstance(where, str) else [] if where is None or callable(where) else list(where)
        self._named = set(named) & set(found)  # by their very names
        self._feature_maps: dict[str, Grid] = {}  # module → size of the feature map that it was given

    def layers(self) -> dict[str, nn.Module]:
        return self._modules

    def by_default(self, layer: str) -> bool:
        return not any(part in ("mid_block", "middle_block") for part in layer.split("."))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = tensors_of((*args, *kwargs.values()))
        self._feature_maps.clear()
        if given and given[0].ndim == 4:
            self._feature_maps[""] = (given[0].shape[-2], given[0].shape[-1])
        latents, timestep = self._read_inputs(args, kwargs)
        conditioning = tuple(x for x in given if x is not latents and x is not timestep)
        return ForwardInputs(latents, timestep, conditioning=conditioning)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._parts[layer.name].check(layer.name)
        layer.state = Projected(named_arguments(module, args, kwargs))

    def leave(self, layer: LayerContext, module: nn.Module) -> AttentionCall | None:
        if layer.seen or any(getattr(module, name, None) is not None for name in AFTER_PROJECTION):
            return None
        heads = _heads(module)
        q, k = (layer.state.outputs[p].unflatten(-1, (heads, -1)).transpose(1, 2) for p in self._projections)
        mask = self._mask(module, layer.state.arguments)
        return AttentionCall(q, k, None, mask, scale=_scale(module))

    def watch(self) -> Iterable[Hooked]:
        around = {name.rpartition(".")[0] for name in self._modules}
        around |= {".".join(name.split(".")[:i]) for name in around for i in range(name.count(".") + 1)}
        for name in sorted(around - {""}):  # of the model itself, begin sees it
            yield self.model.get_submodule(name), partial(self._see_feature_map, name), "before"
        for module in self._modules.values():
            for projection in self._projections:
                yield module.get_submodule(projection), partial(self._see_projection, projection), "after"

    def _see_feature_map(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if running_context() is None:
            return
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is not None and first.ndim == 4:
            self._feature_maps[name] = (first.shape[-2], first.shape[-1])

    def _see_projection(self, projection: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layer = running_layer()
        if layer is None or layer.name not in self._modules or not args:
            return
        state: Projected = layer.state
        state.outputs[projection], state.inputs[projection] = output, args[0]
        if len(state.outputs) < 2:
            return
        queries, keys = (state.inputs[p] for p in self._projections)
        if _same_view(queries, keys) and layer.name not in self._named:
            return  # self-attention, which a pattern never means
        self._check_context(layer.name, state)
        q, k = (state.outputs[p] for p in self._projections)
        layer.awaits = self._layout(layer.name, q.shape[-2], k.shape[-2])

    def _check_context(self, layer: str, state: Projected) -> None:
        """Refuse a module that hands its key projection a part of the context that it was given, unless it is named."""
        if self._projections[1] != "to_k":
            return
        keys = state.inputs[self._projections[1]]
        whole = [x for x in tensors_of(state.arguments.values()) if _is_part(keys, x)]
        if whole:
            query, key = self._projections
            others = [name for name, m in self._modules[layer].named_modules() if _is_key_projection(name, m, keys)]
            other = next((name for name in others if name != key), "its name")
            raise ValueError(
                f"layer {layer} was given a context of {whole[0].shape[-2]} tokens, but its {key} sees "
                f"{keys.shape[-2]} of them: it splits its context. Name the projection of the reference's part with "
                f'projections=("{query}", "{other}"), and describe the tokens of that part'
            )

    def _layout(self, layer: str, queries: int, keys: int) -> TokenLayout:
        grid = self._grid_of(layer, queries)
        described = self._reference(layer, keys, grid)
        described = [described] if isinstance(described, Reference) else described
        references = tuple(reference.on(grid) for reference in described)
        for reference in references:
            reference.check(keys)
        return TokenLayout(grid, references, keys=keys)

    def _grid_of(self, layer: str, tokens: int) -> Grid:
        if self._grid is not None:
            height, width = self._grid(layer, tokens)
            return height, width
        parts = layer.split(".")
        around = [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
        seen = [self._feature_maps[name] for name in around if name in self._feature_maps]
        candidates = seen + ([_halved(seen[-1], i) for i in range(1, 8)] if seen else [])
        for grid in candidates:
            if grid[0] * grid[1] == tokens:
                return grid
        shown = ", ".join(f"{h}×{w}" for h, w in seen) or "none"
        raise ValueError(
            f"layer {layer}: no feature map around it has its {tokens} tokens ({shown} seen), so "
            "their grid is unknown: pass grid=lambda layer, tokens: (height, width)"
        )

    def _guess_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | float]:
        given = named_arguments(self.model, args, kwargs)
        latents = next((given[n] for n in LATENTS if isinstance(given.get(n), Tensor) and given[n].ndim == 4), None)
        if latents is None:
            latents = next((x for x in tensors_of(given.values()) if x.ndim == 4), None)
        timestep = next((given[n] for n in TIMESTEPS if isinstance(given.get(n), (Tensor, int, float))), None)
        if timestep is None and len(args) > 1 and _is_number(args[1]):
            timestep = args[1]
        if latents is None or timestep is None:
            names = ", ".join(inspect.signature(type(self.model).forward).parameters)
            raise ValueError(
                f"no latents [B, C, H, W] or no timestep among the arguments of {type(self.model).__name__} ({names}): "
                "pass inputs=lambda args, kwargs: (latents, timestep)"
            )
        return latents, timestep


def attention_modules(model: nn.Module, projections: tuple[str, str]) -> dict[str, nn.Module]:
    """Return modules with the projections and a number of heads, by name. Raises ValueError where there are none."""
    found = {
        name: m for name, m in model.named_modules() if all(_has(m, p) for p in projections) and _heads(m) is not None
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module with {', '.join(projections)} and a number of heads "
            f"({', '.join(HEADS)}): name its projections with projections=(query, key), or use i2am.attention in it"
        )
    return found


def _has(module: nn.Module, path: str) -> bool:
    """Tell whether a module has a part of that path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _is_key_projection(name: str, module: nn.Module, context: Tensor) -> bool:
    """Tell whether a part of an attention module is a projection to keys of a context ``[B, N, C]``."""
    return "to_k" in name and getattr(module, "in_features", None) == context.shape[-1]


def compvis_mask(module: nn.Module, given: dict[str, Any]) -> Tensor | None:
    """Return CompVis' ``mask``: bool ``[B, …]``, True where a key takes part; flattened over the keys.

    Raises:
        ValueError: a module was given another mask, which only its own code reads.
    """
    masks = {name: x for name, x in given.items() if "mask" in name and isinstance(x, Tensor)}
    mask = masks.pop("mask", None)
    if masks or (mask is not None and mask.dtype != torch.bool):
        raise ValueError(
            f"{type(module).__name__} ran with {', '.join(masks) or 'a mask that is not bool'}, which i2am does not "
            "read: pass mask=lambda module, arguments: … that returns what is added to the logits, or a bool mask "
            "(True = take part), broadcasting to [B, heads, queries, keys]"
        )
    return None if mask is None else mask.flatten(1)[:, None, None]


def _is_part(part: Tensor, whole: Tensor) -> bool:
    """Tell whether ``part`` is a view of fewer tokens of ``whole``; both ``[B, N, C]``."""
    if part.ndim != 3 or whole.ndim != 3 or part.shape[-2] >= whole.shape[-2] or part.shape[-1] != whole.shape[-1]:
        return False
    same: bool = part.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return same


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim <= 1)


def _same_view(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are one and the same piece of memory."""
    if a is b:
        return True
    at = (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
    return at and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _heads(module: nn.Module) -> int | None:
    return next((n for name in HEADS if isinstance(n := getattr(module, name, None), int)), None)


def _scale(module: nn.Module) -> float | None:
    """Return what a module multiplies the logits with; None: it does not say, so ``1/√d``."""
    scale = getattr(module, "scale", None)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return float(scale)
    if scale is None or isinstance(scale, (int, float)):
        return scale
    raise ValueError(
        f"{type(module).__name__} scales its logits by {getattr(scale, 'shape', None) or scale!r}, which is not one "
        "number: use i2am.attention inside it"
    )


def _halved(grid: Grid, times: int) -> Grid:
    return tuple(-(-n // 2**times) for n in grid)
