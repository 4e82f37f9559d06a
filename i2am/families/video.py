"""Stable Video Diffusion: one CLIP token as the context of every frame's spatial cross-attention.

A frame is an image of the batch: maps are ``[images · frames, …]``. The first frame's latents enter as channels, where
attention cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from i2am.families import Forward
from i2am.families.arguments import argument
from i2am.families.unet import CrossAttention, read_grid
from i2am.tracing.intercept import eager


class StableVideo(CrossAttention):
    """``UNetSpatioTemporalConditionModel``."""

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in super().layers().items() if "temporal_transformer_blocks" not in n}

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        sample, timestep = argument(args, kwargs, 0, "sample"), argument(args, kwargs, 1, "timestep")
        return Forward(sample[:, :, : self.unet.config.out_channels], timestep, frames=sample.shape[1])

    def watch(self) -> Iterable[RemovableHandle]:
        for _, module in self.unet.named_modules():
            if type(module).__name__ == "TransformerSpatioTemporalModel":
                yield module.register_forward_pre_hook(eager(read_grid), with_kwargs=True)
