"""Wan 2.2 TI2V, SkyReels V2's diffusion forcing, AnyFlow: given frames stand at a lower timestep than the others.

Wan's own image-to-video models have no tokens of the picture beside CLIP's: :mod:`i2am.families.wan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from i2am.families import CHANNELS, Family, PipelineFacts, Request, no_reference_keys
from i2am.families.frames import Frames, Roles, VideoFrames, frames_before, in_a_row, video_grid
from i2am.families.unet import channels_beside

CHUNKS = (
    "a video is generated in chunks, and what one chunk generated is given to the next: no frame is one or the other"
)


class TimedFrames(VideoFrames):
    """Wan's and SkyReels V2's transformers without image keys, whose timesteps are those of tokens or frames."""

    def __init__(self, transformer: nn.Module):
        super().__init__(transformer)
        self._roles = Roles()

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        if channels_beside(model):
            raise ValueError(no_reference_keys(type(model).__name__, CHANNELS))
        return super().read(model, request)

    def lead_of(self, parts: Sequence[Frames]) -> int:
        return frames_before(parts)

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        latents, timestep = self.latents(given), given["timestep"]
        frames, grid = video_grid(self.transformer, latents)
        if timestep.ndim < 2:
            return [Frames(frames, grid, given=False)]
        roles = self._roles.read(timestep)
        per_frame = len(roles) // frames  # one for each token, or for each frame
        each = [roles[i * per_frame : (i + 1) * per_frame] for i in range(frames)]
        if any(len(set(frame)) != 1 for frame in each):
            raise ValueError(f"only a part of a frame of {grid} tokens is given, so that neither part has a grid")
        return in_a_row([frame[0] for frame in each], grid)


class AnyFlow(TimedFrames):
    """``AnyFlowTransformer3DModel``, whose latents are ``[B, F, C, H, W]``."""

    models = ("AnyFlowTransformer3DModel",)
    pipelines = (PipelineFacts("AnyFlow*", "video"), PipelineFacts("AnyFlowFAR*", refused=CHUNKS))
    conditional_call = None
    batched_guidance = True

    def latents(self, given: dict[str, Any]) -> Tensor:
        latents: Tensor = given["hidden_states"]
        return latents.transpose(1, 2)
