"""Self-attention of UNets: references concatenated to the latents or banked, and attention to itself.

Concatenation and banks put reference tokens among the keys of self-attention, where index sets find them.
``mode="self"`` traces plain self-attention, in which no key is the reference's: its maps are named "self".
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from i2am.families import ForwardInputs, PipelineFacts, TokenLayout
from i2am.families.arguments import argument_of
from i2am.families.joint import NO_REFERENCE
from i2am.families.tokens import reference_names
from i2am.families.unet import UNetFamily, attentions, grid_of
from i2am.references import SELF, Banked, Concatenated, Grid, Reference
from i2am.tracing.guidance import Told
from i2am.tracing.intercept import AttentionCall, LayerContext


class SelfAttention(UNetFamily):
    """Every self-attention, with all its tokens as keys (``mode="self"``)."""

    def layers(self) -> dict[str, nn.Module]:
        return attentions(self.unet, cross=False)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = grid_of(layer)
        layer.awaits = TokenLayout(grid, (Reference(grid=grid, name=SELF),), keys=grid[0] * grid[1])


class ConcatenatedLatents(SelfAttention):
    """References are other parts of the latents."""

    pipelines = (
        PipelineFacts("DreamLite*", described=Concatenated("width")),
        PipelineFacts(
            "DreamLitePipeline",
            described=Concatenated("width"),
            told=lambda pipe: Told(3, 2, how="DreamLite: [unconditional, image only, conditional]"),
        ),
    )

    def __init__(self, unet: nn.Module, concatenated: Concatenated):
        super().__init__(unet)
        self.concatenated = concatenated

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        forward, c = super().begin(args, kwargs), self.concatenated
        height, width = forward.latents.shape[-2:]
        part = c.part((height, width), "the latents")
        parts = forward.latents.chunk(c.parts, dim=-2 if c.axis == "height" else -1)
        if not any(x.any() for i, x in enumerate(parts) if i != c.generated):  # a picture from text alone (DreamLite)
            raise ValueError(NO_REFERENCE.format(model=type(self.unet).__name__))
        conditioning = forward.conditioning or self._beside(args, kwargs, forward.latents.shape[1])
        return forward._replace(latents=parts[c.generated], grid=part, stepped=False, conditioning=conditioning)

    def _beside(self, args: tuple[Any, ...], kwargs: dict[str, Any], latents: int) -> tuple[Tensor, ...]:
        """Return the references among the channels behind the latents' (CatVTON's): zeros where there is none."""
        c, channels = self.concatenated, argument_of(self.unet, args, kwargs, 0, "sample")[:, latents:]
        parts = channels.chunk(c.parts, dim=-2 if c.axis == "height" else -1)
        return tuple(x for i, x in enumerate(parts) if i != c.generated) if channels.shape[1] else ()

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.awaits = self._layout(grid_of(layer), layer.name)

    def _layout(self, grid: Grid, layer: str) -> TokenLayout:
        c = self.concatenated
        part = c.part(grid, f"layer {layer}")
        others = [i for i in range(c.parts) if i != c.generated]
        names = reference_names(len(others))
        references = tuple(
            Reference(grid=part, tokens=c.tokens(grid, i), name=name) for i, name in zip(others, names, strict=True)
        )
        return TokenLayout(part, references, c.tokens(grid, c.generated), keys=grid[0] * grid[1])


class BankedAttention(SelfAttention):
    """References are keys behind the layer's own; where they join them (block or processor) is not asked."""

    told_by_keys = True

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.awaits = partial(_bank, layer.name, grid_of(layer))


def _bank(layer: str, grid: Grid, call: AttentionCall) -> TokenLayout | None:
    own, keys = grid[0] * grid[1], call.key.shape[2]
    if keys % own:
        raise ValueError(f"layer {layer}: {keys} keys are not its own {own} and as many of each reference")
    names = reference_names(keys // own - 1)
    references = tuple(
        Reference(grid=grid, tokens=slice(i * own, (i + 1) * own), name=name) for i, name in enumerate(names, start=1)
    )
    return TokenLayout(grid, references, slice(0, own), keys=keys) if references else None


def read_self_attention(unet: nn.Module, reference: Concatenated | Banked | None) -> SelfAttention:
    """Return the family of a UNet whose self-attention is traced; ``reference=None``: as it is (``mode="self"``)."""
    if not attentions(unet, cross=False):
        raise ValueError(f"{type(unet).__name__} has no self-attention that i2am can trace")
    if isinstance(reference, Concatenated):
        return ConcatenatedLatents(unet, reference)
    return SelfAttention(unet) if reference is None else BankedAttention(unet)
