"""Self-attention of UNets: references concatenated to the latents or banked, and attention to itself.

Concatenation and banks put reference tokens among the keys of self-attention, where index sets find them.
``mode="self"`` traces plain self-attention, in which no key is the reference's: its maps are named "self".
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from i2am.families import Forward
from i2am.families.joint import NO_REFERENCE, reference_names
from i2am.families.unet import UNetFamily, attentions, grid_of
from i2am.references import SELF, Banked, Carried, Concatenated, Grid, Reference
from i2am.tracing.intercept import Call, RunningLayer


class SelfAttention(UNetFamily):
    """Every self-attention, with all its tokens as keys (``mode="self"``)."""

    def layers(self) -> dict[str, nn.Module]:
        return attentions(self.unet, cross=False)

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        grid = grid_of(layer)
        layer.carries = Carried(grid, (Reference(grid=grid, name=SELF),))


class ConcatenatedLatents(SelfAttention):
    """References are other parts of the latents."""

    def __init__(self, unet: nn.Module, concatenated: Concatenated):
        super().__init__(unet)
        self.concatenated = concatenated
        self._carried: dict[Grid, Carried] = {}

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        forward, c = super().begin(args, kwargs), self.concatenated
        part = c.part(tuple(forward.latents.shape[-2:]), "the latents")
        parts = forward.latents.chunk(c.parts, dim=-2 if c.axis == "height" else -1)
        if not any(x.any() for i, x in enumerate(parts) if i != c.generated):  # a picture from text alone (DreamLite)
            raise ValueError(NO_REFERENCE.format(model=type(self.unet).__name__))
        return forward._replace(grid=part)

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        grid = grid_of(layer)
        if grid not in self._carried:
            self._carried[grid] = self._carries(grid, layer.name)
        layer.carries = self._carried[grid]

    def _carries(self, grid: Grid, layer: str) -> Carried:
        c = self.concatenated
        part = c.part(grid, f"layer {layer}")
        others = [i for i in range(c.parts) if i != c.generated]
        names = reference_names(len(others))
        references = tuple(
            Reference(grid=part, tokens=c.tokens(grid, i), name=name) for i, name in zip(others, names, strict=True)
        )
        return Carried(part, references, c.tokens(grid, c.generated))


class BankedAttention(SelfAttention):
    """References are keys behind the layer's own; where they join them (block or processor) is not asked."""

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        layer.carries = partial(_bank, layer.name, grid_of(layer))


def _bank(layer: str, grid: Grid, call: Call) -> Carried | None:
    own, keys = grid[0] * grid[1], call.key.shape[2]
    if keys % own:
        raise ValueError(f"layer {layer}: {keys} keys are not its own {own} and as many of each reference")
    names = reference_names(keys // own - 1)
    references = tuple(
        Reference(grid=grid, tokens=slice(i * own, (i + 1) * own), name=name) for i, name in enumerate(names, start=1)
    )
    return Carried(grid, references, slice(0, own)) if references else None


def read_self_attention(unet: nn.Module, reference: Concatenated | Banked | None) -> SelfAttention:
    """The family of a UNet whose self-attention is traced; ``reference=None``: as it is (``mode="self"``)."""
    if not attentions(unet, cross=False):
        raise ValueError(f"{type(unet).__name__} has no self-attention that i2am can trace")
    if isinstance(reference, Concatenated):
        return ConcatenatedLatents(unet, reference)
    return SelfAttention(unet) if reference is None else BankedAttention(unet)
