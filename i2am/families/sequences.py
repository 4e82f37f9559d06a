"""Modules of any code base that make an attention call over one sequence of text, generated and reference tokens.

Nothing is asked of the modules but that they call an attention function that can be intercepted: fused projections,
norms and rotary embeddings are done by then. The caller says which queries are generated and which keys a reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from i2am.families import Family, ForwardInputs, TokenLayout
from i2am.families.arguments import named_arguments, tensors_of
from i2am.families.modules import TIMESTEPS, Describe, Inputs
from i2am.references import Grid, LayerFilter, Reference, choose_layers
from i2am.tracing.intercept import AttentionCall, LayerContext

LATENTS = ("img", "sample", "hidden_states", "x", "latents", "noisy_latents", "noisy_sample")
Queries = slice | Callable[[str, int], slice]


class Sequences(Family):
    """Modules with one attention over a whole sequence.

    Args:
        model: the module whose forward is one evaluation.
        layers: which modules call attention; of modules inside each other, the outermost.
        queries: which queries are the generated tokens: a slice (negative numbers count from the end), or a function of
            (layer, number of queries).
        reference: which keys encode the reference: references, or a function of (layer, number of keys, grid). A
            module that makes several calls which the description fits needs ``Reference(call=…)``.
        grid: (height, width) of the generated tokens; or a function of (layer, number of generated tokens).
        inputs: latents and timestep of a forward, a function of (args, kwargs).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerFilter,
        queries: Queries,
        reference: Sequence[Reference] | Describe,
        grid: Grid | Callable[[str, int], Grid],
        inputs: Inputs | None = None,
    ):
        self.model = model
        self._queries = queries if callable(queries) else lambda *_: queries
        self._reference = reference if callable(reference) else lambda *_: reference
        self._grid = grid if callable(grid) else lambda *_: grid
        self._canvas = None if callable(grid) else grid
        self._read_inputs = inputs or self._guess_inputs
        modules = {name: m for name, m in model.named_modules() if name}
        chosen = choose_layers(modules, layers)
        within = {name for name in chosen if any(name.startswith(f"{other}.") for other in chosen)}
        self._modules = {name: modules[name] for name in chosen if name not in within}

    def layers(self) -> dict[str, nn.Module]:
        return self._modules

    def by_default(self, layer: str) -> bool:
        return not any(part in ("mid_block", "middle_block") for part in layer.split("."))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        latents, timestep = self._read_inputs(args, kwargs)
        if latents.ndim == 3 and self._canvas is None:
            raise ValueError(
                f"latents of {tuple(latents.shape)} are tokens, which do not tell the picture's shape: pass "
                "grid=(height, width) of the generated tokens"
            )
        given = tensors_of((*args, *kwargs.values()))
        conditioning = tuple(x for x in given if x is not latents and x is not timestep)
        grid = self._canvas if latents.ndim == 3 else None
        return ForwardInputs(latents, timestep, grid, conditioning=conditioning, stepped=grid is None)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.awaits, layer.then = partial(self._layout, layer), partial(self._refuse_another, layer)

    def _refuse_another(self, layer: LayerContext, call: AttentionCall) -> None:
        """Raise ValueError for a further call that the description fits as well, unless it says which is meant."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        try:
            generated = len(range(queries)[self._queries(layer.name, queries)])
            height, width = self._grid(layer.name, generated)
            described = self._reference(layer.name, keys, (height, width))
            references = [described] if isinstance(described, Reference) else list(described)
            for reference in references:
                reference.on((height, width)).check(keys)
        except ValueError:
            return  # it is not of that size
        if generated == height * width and all(reference.call is None for reference in references):
            raise ValueError(
                f"layer {layer.name} makes several attention calls that the description fits, another on {queries} "
                f"queries and {keys} keys: say which has the reference with Reference(call=0), call=1, … or name the "
                "module inside it with layers="
            )

    def _layout(self, layer: LayerContext, call: AttentionCall) -> TokenLayout | None:
        queries, keys = call.query.shape[2], call.key.shape[2]
        chosen = self._queries(layer.name, queries)
        if not isinstance(chosen, slice):
            raise ValueError(f"layer {layer.name}: queries= must give a slice of the queries, got {chosen!r}")
        generated = range(queries)[chosen]
        height, width = self._grid(layer.name, len(generated))
        described = self._reference(layer.name, keys, (height, width))
        references = [described] if isinstance(described, Reference) else list(described)
        numbers = {reference.call or 0 for reference in references}
        if len(numbers) != 1:
            raise ValueError(
                f"layer {layer.name}: references in several calls, {sorted(numbers)}, need one tracer each"
            )
        if len(layer.seen) != numbers.pop():
            return None
        if len(generated) != height * width:
            raise ValueError(
                f"layer {layer.name}: queries= chooses {len(generated)} of {queries} queries, which do not fill the "
                f"grid of {height}×{width}"
            )
        here = tuple(reference.on((height, width)) for reference in references)
        for reference in here:
            reference.check(keys)
        return TokenLayout((height, width), here, slice(generated.start, generated.stop, generated.step), keys=keys)

    def _guess_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | float]:
        given = named_arguments(self.model, args, kwargs)
        found = (_stacked(given.get(name)) for name in LATENTS)
        latents = next((x for x in found if x is not None and x.ndim >= 3), None)
        timestep = next((given[n] for n in TIMESTEPS if isinstance(given.get(n), (Tensor, int, float))), None)
        if latents is None or timestep is None:
            raise ValueError(
                f"no latents ({', '.join(LATENTS)}) or no timestep ({', '.join(TIMESTEPS)}) among the arguments of "
                f"{type(self.model).__name__} ({', '.join(given)}): pass "
                "inputs=lambda args, kwargs: (latents, timestep)"
            )
        return latents, timestep


def _stacked(given: Any) -> Tensor | None:
    """Return latents that are a tensor, or a list of tensors of one shape, as a batch; None: something else."""
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(x, Tensor) for x in given):
        return None
    return torch.stack(list(given)) if len({x.shape for x in given}) == 1 else None
