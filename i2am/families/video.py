"""UNets of videos: Stable Video Diffusion (one CLIP token as every frame's context), AnimateDiff with IP-Adapters.

A frame is an image of the batch: maps are ``[images · frames, …]``. What enters as channels beside the latents (the
first frame of Stable Video Diffusion, PIA's) attention cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from i2am.families import CHANNELS, Family, ForwardInputs, Hooked, PipelineFacts, Request, no_reference_keys
from i2am.families.arguments import argument_of, attribute
from i2am.families.unet import CrossAttention, attentions, read_grid, read_unet


class StableVideo(CrossAttention):
    """``UNetSpatioTemporalConditionModel``."""

    models = ("UNetSpatioTemporalConditionModel",)
    pipelines = (PipelineFacts("StableVideoDiffusion*"),)

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        if request.self_attention:
            raise ValueError(
                "the self-attention of a video UNet goes over frames too, where i2am has no grid to draw on"
            )
        family = read_unet(model, request)
        return cls(model, family.references, family.image_grid) if isinstance(family, CrossAttention) else family

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in super().layers().items() if "temporal_transformer_blocks" not in n}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        sample = argument_of(self.unet, args, kwargs, 0, "sample")
        timestep = argument_of(self.unet, args, kwargs, 1, "timestep")
        latents = sample[:, :, : attribute(self.unet, "config.out_channels")]
        return ForwardInputs(
            latents, timestep, frames=sample.shape[1], conditioning=self.conditioning(args, kwargs), stepped=False
        )

    def watch(self) -> Iterable[Hooked]:
        for _, module in self.unet.named_modules():
            if type(module).__name__ == "TransformerSpatioTemporalModel":
                yield module, read_grid, "before"


class Motion(CrossAttention):
    """``UNetMotionModel``: a 2-D UNet with modules over time between its own; a reference comes by IP-Adapter."""

    models = ("UNetMotionModel",)
    pipelines = (
        PipelineFacts("AnimateDiffVideoToVideo*", refused="the video is only what denoising starts from"),
        PipelineFacts("AnimateDiffControlNet*", refused="the frames given enter as residuals of a ControlNet"),
        PipelineFacts("AnimateDiffSparseControlNet*", refused="the frames given enter as residuals of a ControlNet"),
        PipelineFacts("PIA*", refused=CHANNELS),
    )

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        if request.self_attention or request.references is not None:
            raise ValueError(f"of {type(model).__name__} i2am traces IP-Adapters only: load one, without reference=")
        if not attentions(model) or getattr(model.config, "encoder_hid_dim_type", None) != "ip_image_proj":
            raise ValueError(
                no_reference_keys(type(model).__name__, "its cross-attention looks at text; load the IP-Adapter first")
            )
        return read_unet(model, request)
