"""Cosmos: frames given by a mask, ``condition_mask [B, 1, F, H, W]``, among those of the video's own self-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from i2am.families import RESIDUAL, PipelineFacts
from i2am.families.frames import Frames, VideoFrames, frames_before, masked_frames, video_grid

TRAINED = 1000  # timesteps of σ = 1


class Cosmos(VideoFrames):
    """``CosmosTransformer3DModel``."""

    models = ("CosmosTransformer3DModel",)
    pipelines = (
        PipelineFacts("Cosmos2VideoToWorld*", timestep=lambda t: t / (t + TRAINED)),  # σ/(σ + 1)
        PipelineFacts("CosmosVideoToWorld*", by_timestep=True),  # it asks its scheduler for x₀, and then for a step
        PipelineFacts("Cosmos2_5_Predict*", timestep=lambda t: t / TRAINED),
        PipelineFacts("Cosmos2_5_Transfer*", refused=RESIDUAL),
    )

    def lead_of(self, parts: Sequence[Frames]) -> int:
        return frames_before(parts)

    def latents(self, given: dict[str, Any]) -> Tensor:
        latents, mask = given["hidden_states"], given.get("condition_mask")
        if mask is None:
            return super().latents(given)
        generated = ~mask.bool().flatten(3).any(-1)[0, 0]  # given frames get noise of their own in each call
        return super().latents({**given, "hidden_states": latents[:, :, generated]})

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        frames, grid = video_grid(self.transformer, given["hidden_states"])
        mask = given.get("condition_mask")
        if mask is None:
            return [Frames(frames, grid, given=False)]
        return masked_frames(mask[:, 0], frames, grid, "condition_mask")
