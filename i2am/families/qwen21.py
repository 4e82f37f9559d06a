"""Qwen-Image 2.1: text and references in one causal sequence, the generated picture last.

References stand where the language model saw them, each slot of it four latent tokens. The generated queries attend to
every key in a call of their own: after one call for each part of the prompt, or alone, when the keys of the prompt come
from the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from i2am.families import PipelineFacts, TokenLayout
from i2am.families.joint import NO_REFERENCE, JointTransformer
from i2am.families.tokens import reference_names
from i2am.references import SELF, Grid, Reference

SLOT = 4  # latent tokens a slot of the language model stands for


class QwenImage21(JointTransformer):
    """``QwenImage21Transformer2DModel``."""

    models = ("QwenImage21Transformer2DModel",)
    attentions = ("QwenImage21Attention",)
    sets = ()
    pipelines = (PipelineFacts("QwenImage21*", several=True),)
    latent_pixels = 1

    _last: tuple[Tensor, list[tuple[int, int]]] | None = None

    def layout(self, given: dict[str, Any]) -> TokenLayout:
        shapes = [tuple(shape) for shape in given["img_shapes"][0]]
        if any(frames != 1 for frames, _, _ in shapes):
            raise ValueError(f"img_shapes {shapes}: several frames have no one grid of generated tokens")
        if self.references:
            raise ValueError("Qwen-Image 2.1 has its references in context, which need no description")
        grids: list[Grid] = [(height, width) for _, height, width in shapes]
        places = self._places(given["img_mask"], grids)
        *references, generated = (slice(start, stop) for start, stop in places)
        total = generated.stop
        if self.self_attention:
            parts = [Reference(grids[-1], generated, name=SELF)]
        else:
            names = reference_names(len(references))
            parts = [
                Reference(grid, tokens, name=name)
                for grid, tokens, name in zip(grids[:-1], references, names, strict=True)
            ]
        if not parts:
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        return TokenLayout(grids[-1], tuple(parts), keys=total)

    def _places(self, mask: Tensor, grids: list[Grid]) -> list[tuple[int, int]]:
        """Return the first and last token of each picture, in the order of the tokens; read once per mask."""
        if self._last is None or self._last[0] is not mask:
            slots = mask[0].bool()
            tokens = torch.repeat_interleave(slots, torch.where(slots, SLOT, 1)).nonzero()[:, 0].tolist()
            sizes = [h * w for h, w in grids]
            if sum(sizes) != len(tokens):
                raise ValueError(f"img_shapes make {sum(sizes)} tokens, img_mask {len(tokens)}")
            places, at = [], 0
            for size in sizes:
                first, last = tokens[at], tokens[at + size - 1]
                if last - first + 1 != size:
                    raise ValueError(f"the {size} tokens of a picture do not follow each other in img_mask")
                places.append((first, last + 1))
                at += size
            self._last = mask, places
        return self._last[1]
