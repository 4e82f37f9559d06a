"""Framepack and Helios: the frames that came before, of which the first is the picture, at coarser scales the older.

Framepack: ``[4× coarser ‖ 2× coarser ‖ clean ‖ generated ‖ the picture's SigLIP tokens ‖ text]``. Helios: ``[long ‖
mid ‖ short ‖ generated]``, its text in attention of its own. A history's patches are padded to whole ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from i2am.families import PipelineFacts, TokenLayout
from i2am.families.arguments import attribute
from i2am.families.frames import Frames, VideoFrames, video_grid, video_layout
from i2am.families.tokens import square
from i2am.references import Reference


class Framepack(VideoFrames):
    """``HunyuanVideoFramepackTransformer3DModel``."""

    models = ("HunyuanVideoFramepackTransformer3DModel",)
    pipelines = (PipelineFacts("HunyuanVideoFramepack*"),)
    attentions = ("attn",)
    blocks = ("transformer_blocks.", "single_transformer_blocks.")

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        config = attribute(self.transformer, "config")
        own = _patched(given["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))
        found = []
        for name, argument, patch in (
            ("history_4x", "latents_history_4x", (4, 8, 8)),
            ("history_2x", "latents_history_2x", (2, 4, 4)),
            ("clean", "latents_clean", (1, 2, 2)),
        ):
            latents, indices = given.get(argument), given.get(f"indices_{argument}")
            if latents is not None and indices is not None:
                found.append(_patched(latents, patch)._replace(given=True, name=name))
        return [*found, own]

    def layout(self, parts: Sequence[Frames], given: dict[str, Any]) -> TokenLayout:
        image, start = given["image_embeds"].shape[1], sum(part.tokens for part in parts)
        picture = Reference(square(image), slice(start, start + image), name="picture")
        return video_layout(type(self.transformer).__name__, parts, keys=None, more=[picture])


class Helios(VideoFrames):
    """``HeliosTransformer3DModel``."""

    models = ("HeliosTransformer3DModel",)
    pipelines = (
        PipelineFacts("Helios*"),
        PipelineFacts(
            "HeliosPyramid*",
            refused="the video is denoised at one resolution after another, so that a run has no one grid",
        ),
    )

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        frames, grid = video_grid(self.transformer, given["hidden_states"])
        patch = tuple(attribute(self.transformer, "config.patch_size"))
        found = []
        for name, times in (("long", 4), ("mid", 2), ("short", 1)):
            latents = given.get(f"latents_history_{name}")
            if latents is not None and given.get(f"indices_latents_history_{name}") is not None:
                size = (patch[0] * times, patch[1] * times, patch[2] * times)
                found.append(_patched(latents, size)._replace(given=True, name=name))
        return [*found, Frames(frames, grid, given=False)]


def _patched(latents: Tensor, patch: tuple[int, int, int]) -> Frames:
    """Return frames of latents ``[B, C, F, H, W]`` in patches, the last of which are padded."""
    frames, h, w = (-(-n // p) for n, p in zip(latents.shape[2:], patch, strict=True))
    return Frames(frames, (h, w), given=False)
