"""Kandinsky 6 TI2VA: the picture is a frame behind those of the video, marked by the last of its channels.

Its sound is denoised beside it, in attention of its own; what is drawn is the video's self-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from i2am.families import PipelineFacts
from i2am.families.arguments import attribute
from i2am.families.frames import Frames, VideoFrames, masked_frames


class Kandinsky6(VideoFrames):
    """``Kandinsky6Transformer3DModel``, whose latents are ``[B, F, H, W, C]``."""

    models = ("Kandinsky6Transformer3DModel",)
    pipelines = (PipelineFacts("Kandinsky6TI2VA*"),)

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in self.transformer.named_modules() if n.endswith(".video_dec_block.self_attention")}

    def latents(self, given: dict[str, Any]) -> Tensor:
        video: Tensor = given["hidden_states"]
        channels = attribute(self.transformer, "config.in_visual_dim")
        if channels == video.shape[-1]:
            return video
        return video[..., :channels] * (1 - video[..., -1:])  # without the picture's frame

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        video, patch = given["hidden_states"], attribute(self.transformer, "config.patch_size")
        frames, h, w = (n // p for n, p in zip(video.shape[1:4], patch, strict=True))
        if not attribute(self.transformer, "config.visual_cond"):
            return [Frames(frames, (h, w), given=False)]
        return masked_frames(video[..., -1], frames, (h, w), "the last channel")
