"""Cosmos 3: ``[text ‖ video ‖ sound ‖ actions]``, where the frames that are not noisy are given.

A layer makes two calls: one of the text on itself, and one of all that is generated on everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from i2am.families import PipelineFacts, TokenLayout
from i2am.families.frames import Frames, VideoFrames, frames_before, in_a_row
from i2am.references import Reference


class Cosmos3(VideoFrames):
    """``Cosmos3OmniTransformer``, which is given one video at a time."""

    models = ("Cosmos3OmniTransformer",)
    pipelines = (PipelineFacts("Cosmos3Omni*"),)
    attentions = ("self_attn",)
    blocks = ("layers.",)

    def lead_of(self, parts: Sequence[Frames]) -> int:
        return frames_before(parts)

    def latents(self, given: dict[str, Any]) -> Tensor:
        video: Tensor = given["vision_tokens"][0]
        return video[:, :, given["vision_noisy_frame_indexes"][0]]

    def timestep(self, given: dict[str, Any]) -> Tensor | float:
        timesteps: Tensor = given["vision_timesteps"]
        return timesteps.max()

    def frames_of(self, given: dict[str, Any]) -> Sequence[Frames]:
        shapes, noisy = given["vision_token_shapes"], given["vision_noisy_frame_indexes"]
        if len(shapes) != 1:
            raise ValueError(f"{len(shapes)} videos or pictures in one sequence: trace one at a time")
        frames, h, w = shapes[0]
        generated = set(noisy[0].tolist())
        return in_a_row([i not in generated for i in range(frames)], (h, w))

    def layout(self, parts: Sequence[Frames], given: dict[str, Any]) -> TokenLayout:
        own, text = super().layout(parts, given), given["und_len"]
        return own._replace(
            references=tuple(_behind(text, reference) for reference in own.references), keys=given["sequence_length"]
        )


def _behind(text: int, reference: Reference) -> Reference:
    """Return a reference among the keys, which begin with the text; the queries do not."""
    tokens = reference.tokens
    assert isinstance(tokens, slice)
    return replace(reference, tokens=slice(tokens.start + text, tokens.stop + text))
