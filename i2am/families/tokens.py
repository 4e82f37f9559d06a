"""How image encoders lay out their tokens, and references among the tokens of a longer sequence."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from i2am.references import Grid, Reference


def clip_tokens(length: int, image_grid: Grid | None) -> Reference:
    """Return a CLIP image as ``length`` tokens: one pooled token has no grid; else a class token and the patches.

    CLIP encoders see square images; without the encoder's own grid, a square number of patches is a square.
    """
    patches = length - 1
    side = math.isqrt(patches)
    if image_grid is not None and image_grid[0] * image_grid[1] == patches:
        return Reference(grid=image_grid, skip=1)
    if patches > 0 and side * side == patches:
        return Reference(grid=(side, side), skip=1)
    return Reference()


def square(tokens: int) -> Grid:
    """Return the grid of SigLIP's patches, which have no class token and lie on a square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} image tokens are no square of patches")
    return side, side


def patch_grid(encoder: object) -> Grid | None:
    """Return the patch grid of a CLIP-like image encoder, from its config."""
    config = getattr(encoder, "config", None)
    config = getattr(config, "vision_config", config)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return None
    return image // patch, image // patch


def among(part: slice, reference: Reference) -> Reference:
    """Return a reference whose ``tokens`` count from the first token of ``part``, as tokens of the whole attention."""
    length = part.stop - part.start
    reference.check(length)
    tokens = reference.tokens
    if isinstance(tokens, slice):
        chosen = range(part.start, part.stop)[tokens]
        return replace(reference, tokens=slice(chosen.start, chosen.stop, chosen.step))
    index = torch.as_tensor(tokens)
    index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
    return replace(reference, tokens=index % length + part.start)


def reference_names(count: int) -> list[str]:
    """Return the names of ``count`` references that nobody has named."""
    return ["reference"] if count == 1 else [f"reference_{i}" for i in range(count)]
