"""Scores of attribution maps against masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE_WEIGHT = 3.0
THRESHOLD = 0.4


def imacs(map: Tensor, mask: Tensor, *, complement: bool = False, premultiply: bool = False) -> Tensor:
    """IMACS: how well a map keeps to a mask (Park & Jang, ICLR 2025, section 3.4).

    The map is min-max normalised, resized to the mask (bicubic), normalised again, and values up to 0.4 are set to 0:
    ``IMACS = Σ a·m / Σ m − 3 · Σ a·(1−m) / Σ (1−m)``. R2G is scored with the inpainting region, G2R with the mask of
    the reference object.

    Args:
        map: ``[h, w]`` or ``[B, h, w]``, any scale. A constant map scores 0.
        mask: ``[H, W]`` or ``[B, H, W]``, values in [0, 1]; soft values are weights. Where it is 1 everywhere, the
            outside term is 0.
        complement: score ``max − map`` instead, as the authors' published script does for R2G.
        premultiply: multiply the resized map by the mask first, as that script does for G2R; the outside term is
            then 0.

    Returns:
        a scalar, or ``[B]``; in [-3, 1], higher is better.

    Raises:
        ValueError: an empty mask, values that are not finite or outside [0, 1], or shapes that don't fit.
    """
    map, mask = torch.as_tensor(map), torch.as_tensor(mask)
    if map.ndim not in (2, 3) or mask.ndim not in (2, 3):
        raise ValueError(f"map and mask must be [h, w] or [B, h, w], got {tuple(map.shape)} and {tuple(mask.shape)}")
    single = map.ndim == 2 and mask.ndim == 2
    a = map.reshape(-1, *map.shape[-2:]).double()
    m = mask.reshape(-1, *mask.shape[-2:]).double()
    if len(a) != len(m) and 1 not in (len(a), len(m)):
        raise ValueError(f"{len(a)} maps, but {len(m)} masks")
    if not a.isfinite().all() or not m.isfinite().all():
        raise ValueError("map and mask must be finite; a NaN map is a time group in which nothing ran")
    if m.min() < 0 or m.max() > 1:
        raise ValueError(f"mask values must lie in [0, 1], got [{m.min():g}, {m.max():g}]")
    if (m.sum((1, 2)) == 0).any():
        raise ValueError("empty mask: IMACS compares inside with outside, and there is no inside")
    a = _min_max(-a if complement else a)
    a = F.interpolate(a[:, None], m.shape[-2:], mode="bicubic", align_corners=False)[:, 0]
    a = _min_max(a * m if premultiply else a)
    a = torch.where(a > THRESHOLD, a, 0.0)
    outside = (1 - m).sum((1, 2))
    leaked = (a * (1 - m)).sum((1, 2)) / outside.clamp_min(torch.finfo(outside.dtype).tiny)
    score = (a * m).sum((1, 2)) / m.sum((1, 2)) - OUTSIDE_WEIGHT * leaked
    return score[0] if single else score


def _min_max(x: Tensor) -> Tensor:
    """``[B, h, w]`` scaled to [0, 1] each; a constant one becomes 0."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny), 0.0)
