"""Where an inserted object is, read off its R2G map: the paper's detection task (Park & Jang, ICLR 2025, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BORDER = 2


class Box(NamedTuple):
    """Pixels ``top ≤ y < bottom``, ``left ≤ x < right``."""

    top: int
    left: int
    bottom: int
    right: int

    def iou(self, other: Box) -> float:
        """Intersection over union, in [0, 1]."""
        height = min(self.bottom, other[2]) - max(self.top, other[0])
        width = min(self.right, other[3]) - max(self.left, other[1])
        shared = max(height, 0) * max(width, 0)
        areas = [(b - t) * (r - l) for t, l, b, r in (self, other)]
        return shared / (sum(areas) - shared)


def detect_box(
    map: Tensor, *, size: tuple[int, int] | None = None, threshold: float = 0.4, smallest: float = 0.01
) -> Box | None:
    """The box of the region that the reference influenced most.

    The map (an R2G map as a rule) is min-max normalised and thresholded; a border of 2 pixels and components smaller
    than ``smallest`` go, an opening smooths what is left, and the largest component's box is the answer.

    Args:
        map: ``[h, w]``.
        size: ``(height, width)`` to resize to first (bicubic), so that the box is in image pixels. None: as it is.
        threshold: of the normalised map, in (0, 1).
        smallest: area of the smallest component that counts, as a share of the map.

    Returns:
        a :class:`Box` in pixels of ``size``, or None where nothing stands out (a constant map, or nothing survives).

    Raises:
        ValueError: not one finite map, or a threshold outside (0, 1).
    """
    from scipy import ndimage

    x = torch.as_tensor(map).detach().cpu().double()
    if x.ndim != 2 or not x.isfinite().all():
        raise ValueError(f"detect_box takes one finite map [h, w], got shape {tuple(x.shape)}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
    if size is not None:
        x = torch.nn.functional.interpolate(x[None, None], size, mode="bicubic", align_corners=False)[0, 0]
    if x.max() == x.min():
        return None
    hot = ((x - x.min()) / (x.max() - x.min()) > threshold).numpy()
    inner = np.zeros_like(hot)
    inner[BORDER:-BORDER, BORDER:-BORDER] = hot[BORDER:-BORDER, BORDER:-BORDER]
    hot = _large_components(inner, smallest * hot.size)
    hot = ndimage.binary_opening(hot)
    labels, count = ndimage.label(hot)
    if count == 0:
        return None
    largest = 1 + int(np.argmax(np.bincount(labels.flat)[1:]))
    rows, columns = ndimage.find_objects(labels)[largest - 1]
    return Box(rows.start, columns.start, rows.stop, columns.stop)


def _large_components(hot: np.ndarray, area: float) -> np.ndarray:
    from scipy import ndimage

    labels, _ = ndimage.label(hot)
    sizes = np.bincount(labels.flat)
    sizes[0] = 0
    return (sizes >= area)[labels] & hot
