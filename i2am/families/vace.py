"""Wan VACE: reference pictures are the first latent frames, in the model's own blocks and in those of its branch.

They are denoised along with the video; what they show enters through the branch, at their own tokens. They are told by
its input, ``[what is kept ‖ what is changed ‖ mask]``: nothing of a reference is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from i2am.families import PipelineFacts
from i2am.families.arguments import attribute
from i2am.families.frames import Frames, VideoFrames, video_grid


class VACE(VideoFrames):
    """``WanVACETransformer3DModel``."""

    models = ("WanVACETransformer3DModel",)
    pipelines = (PipelineFacts("WanVACE*", "reference_images", several=True),)
    blocks = ("blocks.", "vace_blocks.")

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        frames, grid = video_grid(self.transformer, given["hidden_states"])
        control, channels = given["control_hidden_states"], int(attribute(self.transformer, "config.in_channels"))
        unchanged = ~control[:, channels:].transpose(1, 2).flatten(2).any(-1).any(0)  # [F]
        references = 0
        while references < min(frames, len(unchanged)) and bool(unchanged[references]):
            references += 1
        each = [Frames(1, grid, given=True)] * references
        return [*each, Frames(frames - references, grid, given=False)] if references < frames else each
