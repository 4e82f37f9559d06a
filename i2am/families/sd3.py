"""Stable Diffusion 3 with an IP-Adapter: a second call of the image tokens, keys ``[image ‖ resampled tokens]``.

The joint call before it runs over ``[image ‖ text]``; that is what ``mode="self"`` looks at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am.families import Forward
from i2am.families.arguments import named_arguments
from i2am.families.resampler import Rollout
from i2am.families.unet import no_reference_keys
from i2am.references import SELF, Carried, Grid, Reference
from i2am.tracing.intercept import RunningLayer, eager, running_scope


class StableDiffusion3:
    """``SD3Transformer2DModel``."""

    conditional_call: int | None = 0  # skip-layer guidance calls once more
    batched_guidance = True
    latent_pixels = 1

    def __init__(
        self,
        transformer: nn.Module,
        references: Sequence[Reference] | None = None,
        *,
        itself: bool = False,
        rollout: bool = False,
    ):
        if references:
            raise ValueError("SD3's text tokens encode no reference: load its IP-Adapter, which needs no description")
        self.transformer = transformer
        self.itself = itself
        self._grid: Grid = (0, 0)
        self._rollout = Rollout(transformer.image_proj) if rollout else None

    def has_adapters(self) -> bool:
        """Whether an IP-Adapter is loaded."""
        return bool(self._adapters())

    def layers(self) -> dict[str, nn.Module]:
        if self.itself:
            return {n: m for n, m in self._attentions().items() if n.endswith(".attn")}
        if not self._adapters():
            raise ValueError(no_reference_keys(type(self.transformer).__name__, "no IP-Adapter is loaded"))
        return self._adapters()

    def by_default(self, layer: str) -> bool:
        return True

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        given = named_arguments(self.transformer, args, kwargs)
        latents, patch = given["hidden_states"], self.transformer.config.patch_size
        self._grid = (latents.shape[-2] // patch, latents.shape[-1] // patch)
        return Forward(latents, given["timestep"])

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.itself:
            own = slice(0, self._grid[0] * self._grid[1])
            layer.carries = Carried(self._grid, (Reference(self._grid, own, name=SELF),), own)

    def leave(self, layer: RunningLayer, module: nn.Module) -> None:
        return None

    def watch(self) -> Iterable[RemovableHandle]:
        if self._rollout is not None:
            yield from self._rollout.watch()
        for module in () if self.itself else self._adapters().values():
            yield module.processor.to_k_ip.register_forward_pre_hook(eager(lambda _, args: self._announce(args[0])))

    def _attentions(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.transformer.named_modules() if type(m).__name__ == "Attention"}

    def _adapters(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self._attentions().items() if hasattr(m.processor, "to_k_ip")}

    def _announce(self, embeds: Tensor) -> None:
        """The next call is the adapter's: its tokens stand behind the image's own."""
        scope = running_scope()
        if scope is not None and scope.layers:
            own = self._grid[0] * self._grid[1]
            reference = Reference(tokens=slice(own, own + embeds.shape[-2]), name="ip_adapter")
            rolls = None
            if self._rollout is not None:
                rolls = (self._rollout.matrix,)
                reference = replace(reference, grid=square(rolls[0].shape[-1]))
            scope.layers[-1].carries = Carried(self._grid, (reference,), rolls=rolls)


def square(tokens: int) -> Grid:
    """SigLIP's patches, which have no class token and lie on a square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} image tokens are no square of patches")
    return side, side
