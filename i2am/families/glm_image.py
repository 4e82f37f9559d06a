"""GLM-Image: references whose keys are put into a cache, before the run, and read from there.

Each reference is one call of the model before denoising, at timestep 0. Then keys are ``[references ‖ text ‖
generated]``; the unconditional call of each step leaves the cache out.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from i2am.families import ForwardInputs, PipelineFacts, TokenLayout
from i2am.families.arguments import attribute, named_arguments
from i2am.families.joint import NO_REFERENCE, JointTransformer, Segment
from i2am.families.tokens import reference_names
from i2am.references import SELF, Grid, Reference
from i2am.tracing.intercept import LayerContext


class GlmImage(JointTransformer):
    """``GlmImageTransformer2DModel``."""

    models = ("GlmImageTransformer2DModel",)
    attentions = ("Attention",)
    sets = ()
    pipelines = (PipelineFacts("GlmImage*", several=True),)
    timestep_scale = 1.0

    _cache: Any = None
    _grids: dict[int, list[Grid]]  # sample → of its references, in the order of the cache

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        latents, patch = given["hidden_states"], int(attribute(self.transformer, "config").patch_size)
        grid: Grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
        cache = given.get("kv_caches")
        first = None if cache is None else cache[0]
        if first is not None and first.mode == "write":
            if self._cache is not cache:
                self._cache, self._grids = cache, {}
            self._grids.setdefault(first.current_sample_idx, []).append(grid)
            return ForwardInputs(latents, given["timestep"], grid, aside="they put a reference's keys into the cache")
        text = given["encoder_hidden_states"]
        read = first is not None and first.mode == "read" and first.k_caches
        references = self._cached(cache, first) if read else []
        skipped = not read and cache is not None and cache is self._cache
        self.carried = self._layout(grid, text.shape[1], references, skipped=skipped)
        # the scheduler's timesteps count from 1
        return ForwardInputs(latents, given["timestep"] + 1, grid, conditioning=(text,), stepped=False)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.carried is not None and self.carried.references:  # the unconditional call leaves the cache out
            layer.awaits = self.carried

    def _cached(self, cache: Any, first: Any) -> list[Segment]:
        """Return the references that the cache holds, which are the same for every sample."""
        grids = self._grids if self._cache is cache else {}
        one = next(iter(grids.values()), [])
        if any(other != one for other in grids.values()):
            raise ValueError("samples have references of different sizes: trace one prompt at a time")
        found: list[Segment] = []
        for grid in one:
            found.append(Segment(found[-1].stop if found else 0, grid))
        held = first.k_caches[0].shape[1]
        if not found or found[-1].stop != held:
            raise ValueError(
                f"the KV cache holds {held} reference tokens that were put there before tracing began, so their grids "
                "are unknown: trace the whole call of the pipeline"
            )
        return found

    def _layout(self, grid: Grid, text: int, references: list[Segment], *, skipped: bool) -> TokenLayout:
        """Return the layout of keys ``[references ‖ text ‖ generated]``, queries ``[text ‖ generated]``."""
        tokens, cached = grid[0] * grid[1], references[-1].stop if references else 0
        queries, total = slice(text, text + tokens), cached + text + tokens
        if self.self_attention:
            own = slice(cached + text, total)
            return TokenLayout(grid, (Reference(grid, own, name=SELF),), queries, keys=total)
        names = reference_names(len(references))
        parts = tuple(
            Reference(s.grid, slice(s.start, s.stop), name=name) for s, name in zip(references, names, strict=True)
        )
        if not parts and not skipped:
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        return TokenLayout(grid, parts, queries, keys=total)
