"""GLIGEN with pictures: gated self-attention over ``[the layer's own tokens ‖ a phrase a box ‖ a picture a box]``.

A box's picture is one pooled token, so that there is R2G and mass, and no map on the picture. Boxes that nobody filled
hold a learned vector: they are keys too, and no reference. Once the pipeline lets go of the boxes
(``gligen_scheduled_sampling_beta``), these are empty in every call: the calls from then on do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from i2am.families import ForwardInputs, PipelineFacts, TokenLayout
from i2am.families.arguments import attribute, named_arguments
from i2am.families.tokens import reference_names
from i2am.families.unet import UNetFamily, grid_of
from i2am.references import Reference
from i2am.tracing.intercept import LayerContext, running_context


class Gligen(UNetFamily):
    """A UNet with ``position_net`` for phrases and pictures."""

    pipelines = (PipelineFacts("StableDiffusionGLIGENTextImage*", "gligen_images", several=True),)
    why_not_itself = 'of a GLIGEN layer i2am tells apart the pictures of boxes alone: mode="self" maps its attn1'

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        self._boxes = 0  # of each kind among the keys
        self._filled: list[list[int]] = []  # of each sample, boxes with a picture

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.unet.named_modules() if n.endswith(".fuser.attn")}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.unet, args, kwargs)
        boxes = (given.get("cross_attention_kwargs") or {}).get("gligen") or {}
        masks = boxes.get("image_masks")
        forward = super().begin(args, kwargs)
        if not isinstance(masks, Tensor):
            raise ValueError(
                f"this call of the {type(self.unet).__name__} has no pictures in boxes (cross_attention_kwargs with "
                "gligen, image_masks), so no attention keys encode a reference"
            )
        self._boxes = masks.shape[1]
        self._filled = [[i for i, filled in enumerate(row) if filled] for row in masks.tolist()]
        if not any(self._filled):
            return forward._replace(aside="the boxes are empty")
        return forward

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = running_context()
        assert context is not None
        counted = self._filled[context.conditional]
        if any(filled != counted[0] for filled in counted):
            raise ValueError("the samples of this batch have pictures in different boxes: trace one at a time")
        if counted[0]:
            layer.awaits = self._layout(layer, counted[0])

    def _layout(self, layer: LayerContext, filled: Sequence[int]) -> TokenLayout:
        grid = grid_of(layer)
        own = grid[0] * grid[1]
        first = own + self._boxes  # the phrases come before the pictures
        references = tuple(
            Reference(tokens=slice(first + i, first + i + 1), name=name)
            for i, name in zip(filled, reference_names(len(filled)), strict=True)
        )
        return TokenLayout(grid, references, slice(0, own), keys=own + 2 * self._boxes)


def has_picture_boxes(unet: nn.Module) -> bool:
    """Return whether a UNet has gated self-attention over pictures in boxes."""
    return hasattr(unet, "position_net") and hasattr(attribute(unet, "position_net"), "linears_image")
