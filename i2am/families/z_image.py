"""Z-Image-Omni: ``[captions ‖ references ‖ generated ‖ SigLIP tokens]`` in one sequence, ragged over the batch.

Each part is padded to a multiple of 32 tokens, which are keys too. The first blocks (``noise_refiner``) see
``[references ‖ generated]`` alone. SigLIP's tokens are laid out channel by channel by the model before they are read as
tokens, so that each mixes all places of the picture: they have no grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from i2am.families import RESIDUAL, START, ForwardInputs, PipelineFacts
from i2am.families.arguments import named_arguments
from i2am.families.joint import NO_REFERENCE, JointTransformer, Segment
from i2am.families.tokens import reference_names
from i2am.references import Reference
from i2am.tracing.guidance import Told
from i2am.tracing.intercept import LayerContext, running_context

MULTIPLE = 32  # of tokens, of every caption and picture


class Sequence(NamedTuple):
    """Places of one sample's parts; pictures count from the first picture's first token."""

    text: int
    generated: Segment
    references: tuple[Segment, ...]
    siglip: tuple[tuple[int, int], ...]  # (first token behind the pictures, tokens) per reference
    pictures: int
    total: int


class ZImage(JointTransformer):
    """``ZImageTransformer2DModel``."""

    models = ("ZImageTransformer2DModel",)
    attentions = ("Attention",)
    sets = ()
    pipelines = (
        PipelineFacts(
            "ZImageOmni*",
            several=True,
            told=lambda pipe: Told(
                1 + bool(pipe.do_classifier_free_guidance), 0, how="Z-Image-Omni: [conditional, unconditional]"
            ),
        ),
        PipelineFacts("ZImageImg2Img*", refused=START),
        PipelineFacts("ZImageInpaint*", refused=START),
        PipelineFacts("ZImageControlNet*", refused=RESIDUAL),
    )
    conditional_call = None
    batched_guidance = True

    def layers(self) -> dict[str, nn.Module]:
        return {n: m for n, m in super().layers().items() if n.startswith(("noise_refiner.", "layers."))}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        pictures = given["x"]
        if not isinstance(pictures[0], list):  # one picture a sample
            pictures = [[picture] for picture in pictures]
        if not self.self_attention and not any(len(sample) > 1 for sample in pictures):
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        if not isinstance(given["x"][0], list):
            raise ValueError("self-attention of a Z-Image without references among its pictures is not traced")
        siglip = given.get("siglip_feats") or [None] * len(pictures)
        patch = given.get("patch_size", 2)
        self._samples = [_read(*sample, patch) for sample in zip(pictures, given["cap_feats"], siglip, strict=True)]
        latents = torch.stack([sample[-1] for sample in pictures])
        timestep = (1 - given["t"]) * 1000
        return ForwardInputs(latents, timestep, self._samples[0].generated.grid, stepped=False)

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = running_context()
        assert context is not None
        counted = self._samples[context.conditional]
        one = counted[0]
        if any(sample != one for sample in counted):
            raise ValueError(
                "the samples of this batch have captions or pictures of different lengths, so that their tokens are "
                "in different places: trace one prompt at a time"
            )
        whole = layer.name.startswith("layers.")
        keys = max(sample.total if whole else sample.pictures for sample in self._samples)
        text = one.text if whole else 0
        layout = self.in_context(one.generated, one.references, text, slice(0, text), keys)
        if whole and not self.self_attention:
            start = one.text + one.pictures
            siglip = [
                Reference(tokens=slice(start + at, start + at + n), name=f"{name}.siglip")
                for (at, n), name in zip(one.siglip, reference_names(len(one.references)), strict=False)
            ]
            layout = layout._replace(references=(*layout.references, *siglip))
        layer.awaits = layout


def _read(pictures: list[Tensor], captions: list[Tensor], siglip: list[Tensor | None] | None, patch: int) -> Sequence:
    segments, start = [], 0
    for picture in pictures:
        _, frames, height, width = picture.shape
        if frames != 1:
            raise ValueError(f"pictures of {frames} frames have no one grid of generated tokens")
        segments.append(Segment(start, (height // patch, width // patch)))
        start += _padded(segments[-1].stop - segments[-1].start)
    found, at = [], 0
    for tokens in siglip or ():
        count = MULTIPLE if tokens is None else tokens.shape[0] * tokens.shape[1]
        found.append((at, count))
        at += _padded(count)
    text = sum(_padded(len(caption)) for caption in captions)
    *references, generated = segments
    return Sequence(text, generated, tuple(references), tuple(found[: len(references)]), start, text + start + at)


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
