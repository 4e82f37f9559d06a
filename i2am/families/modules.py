"""Attention modules of any code base, by what they are made of: ``to_q``, ``to_k`` and ``heads`` (CompVis' ``ldm``).

Their attention is often two einsums, where no call can be intercepted. Hooks on the projections see the very queries
and keys instead, and attribution is computed beside the module's own output. A call that does go through
``scaled_dot_product_attention`` or xformers is intercepted as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am.families import Forward
from i2am.families.arguments import named_arguments
from i2am.references import Carried, Grid, LayerFilter, Reference, choose_layers
from i2am.tracing.intercept import Call, RunningLayer, eager, running_scope

TIMESTEPS = ("timesteps", "timestep", "t", "time", "sigma", "sigmas", "noise_level")
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
Inputs = Callable[[tuple, dict[str, Any]], tuple[Tensor, Tensor | float]]
Mask = Callable[[nn.Module, dict[str, Any]], Tensor | None]


class AttentionModules:
    """Attention modules inside ``model`` that have query and key projections and a number of heads.

    Args:
        model: the module whose forward is one evaluation.
        where: which attention modules; None: those that attend to something else than their own input.
        reference: which of their keys encode the reference: references, or a function of (layer, number of keys, grid
            of the generated tokens).
        grid: of the generated tokens where no module around the attention is given a feature map of that size: a
            function of (layer, number of tokens).
        mask: the attention mask of a module, a function of (module, its arguments by name); None: an argument ``mask``
            as CompVis' modules take it, and no other.
        inputs: latents and timestep of a forward, a function of (args, kwargs).
        projections: names of the query and key projection.
    """

    conditional_call = None

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
        self._chosen = where is not None
        found = attention_modules(model, projections)
        self._modules = {name: found[name] for name in choose_layers(found, where)}
        self._feature_maps: dict[str, Grid] = {}  # module → size of the feature map that it was given

    def layers(self) -> dict[str, nn.Module]:
        return self._modules

    def by_default(self, layer: str) -> bool:
        return True

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        latents, timestep = self._read_inputs(args, kwargs)
        return Forward(latents, timestep)

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        layer.arguments = args, kwargs

    def leave(self, layer: RunningLayer, module: nn.Module) -> Call | None:
        """The attention that a module computed by itself, from its projections; None: it can't be told from these."""
        if any(getattr(module, name, None) is not None for name in AFTER_PROJECTION):
            return None
        heads = _heads(module)
        q, k = (layer.projected[p].unflatten(-1, (heads, -1)).transpose(1, 2) for p in self._projections)
        mask = self._mask(module, named_arguments(module, *layer.arguments))
        return Call(q, k, None, mask, scale=_scale(module))

    def watch(self) -> Iterable[RemovableHandle]:
        around = {""} | {name.rpartition(".")[0] for name in self._modules}
        around |= {".".join(name.split(".")[:i]) for name in around for i in range(name.count(".") + 1)}
        for name in sorted(around):
            see = eager(self._see_feature_map(name))
            yield self.model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True)
        for module in self._modules.values():
            for projection in self._projections:
                yield getattr(module, projection).register_forward_hook(eager(self._see_projection(projection)))

    def _see_feature_map(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is not None and first.ndim == 4:
                self._feature_maps[name] = tuple(first.shape[-2:])

        return hook

    def _see_projection(self, projection: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            scope = running_scope()
            if scope is None or not scope.layers or scope.layers[-1].name not in self._modules:
                return
            layer = scope.layers[-1]
            layer.projected[projection] = output
            layer.inputs[projection] = args[0] if args else None
            if len(layer.projected) == 2 and (self._chosen or len({id(x) for x in layer.inputs.values()}) == 2):
                q, k = (layer.projected[p] for p in self._projections)
                layer.carries = self._carries(layer.name, q.shape[-2], k.shape[-2])

        return hook

    def _carries(self, layer: str, queries: int, keys: int) -> Carried:
        grid = self._grid_of(layer, queries)
        described = self._reference(layer, keys, grid)
        described = [described] if isinstance(described, Reference) else described
        references = tuple(reference.on(grid) for reference in described)
        for reference in references:
            reference.check(keys)
        return Carried(grid, references)

    def _grid_of(self, layer: str, tokens: int) -> Grid:
        if self._grid is not None:
            return tuple(self._grid(layer, tokens))
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

    def _guess_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | float]:
        given = named_arguments(self.model, args, kwargs)
        values = [*args, *kwargs.values()]
        latents = next((x for x in values if isinstance(x, Tensor) and x.ndim == 4), None)
        timestep = next((given[name] for name in TIMESTEPS if name in given), args[1] if len(args) > 1 else None)
        if latents is None or not isinstance(timestep, (Tensor, int, float)):
            names = ", ".join(inspect.signature(type(self.model).forward).parameters)
            raise ValueError(
                f"no latents [B, C, H, W] or no timestep among the arguments of {type(self.model).__name__} ({names}): "
                "pass inputs=lambda args, kwargs: (latents, timestep)"
            )
        return latents, timestep


def attention_modules(model: nn.Module, projections: tuple[str, str]) -> dict[str, nn.Module]:
    """Modules with the projections and a number of heads, by name. Raises ValueError where there are none."""
    found = {
        name: m
        for name, m in model.named_modules()
        if all(isinstance(getattr(m, p, None), nn.Module) for p in projections) and _heads(m) is not None
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention module with {', '.join(projections)} and a number of heads "
            f"({', '.join(HEADS)}): name its projections with projections=(query, key), or use i2am.attention in it"
        )
    return found


def compvis_mask(module: nn.Module, given: dict[str, Any]) -> Tensor | None:
    """CompVis' ``mask``: bool ``[B, …]``, True where a key takes part; flattened over the keys.

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


def _heads(module: nn.Module) -> int | None:
    return next((n for name in HEADS if isinstance(n := getattr(module, name, None), int)), None)


def _scale(module: nn.Module) -> float | None:
    """What a module multiplies the logits with; None: it does not say, so ``1/√d``."""
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
