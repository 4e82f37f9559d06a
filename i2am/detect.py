"""Where an inserted object is, read off its R2G map: the paper's detection task (Park & Jang, ICLR 2025, section 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2am._images import as_array, is_pil

BORDER = 2
FLOOR = 1e-4  # of a map's maximum: smaller values are taken for it before their logarithm


class Box(NamedTuple):
    """Pixels ``top ≤ y < bottom``, ``left ≤ x < right``."""

    top: int
    left: int
    bottom: int
    right: int

    def iou(self, other: Box) -> float:
        """Return intersection over union, in [0, 1]."""
        height = min(self.bottom, other[2]) - max(self.top, other[0])
        width = min(self.right, other[3]) - max(self.left, other[1])
        shared = max(height, 0) * max(width, 0)
        areas = [(b - t) * (r - l) for t, l, b, r in (self, other)]
        return shared / (sum(areas) - shared)


def detect_box(
    map: Any, *, size: tuple[int, int] | None = None, threshold: float | str = "otsu", smallest: float = 0.01
) -> Box | list[Box | None] | None:
    """Find the box of the region that the reference influenced most.

    The map (an R2G map as a rule) is thresholded; a border of 2 pixels and components smaller than ``smallest`` go, an
    opening smooths what is left, and the largest component's box is the answer.

    A column softmax gives keys that nobody needs as much weight as others, and these gather in few cells: R2G has
    peaks several times as high as the object, which a share of the maximum cannot see past. Logarithms can, and Otsu's
    threshold finds the valley between outside and inside (docs/evidence.md compares both).

    Args:
        map: a tensor or array ``[h, w]``, or a batch ``[B, h, w]``; not negative for "otsu".
        size: ``(height, width)`` to resize to first (bicubic), so that the box is in image pixels. None: as it is.
        threshold: "otsu": of the map's logarithms, where the variance between both sides is largest (Otsu, IEEE Trans.
            SMC 1979); or a share of the min-max normalised map, in (0, 1), as the authors' script has it.
        smallest: area of the smallest component that counts, as a share of the map.

    Returns:
        a :class:`Box` in pixels of ``size``, or None where nothing stands out (a constant map, or nothing survives);
        of a batch a list of these.

    Raises:
        ValueError: not finite maps, a negative one under "otsu", or a threshold that is neither this nor in (0, 1).
    """
    x = None if is_pil(map) else as_array(map)
    if x is None or x.ndim not in (2, 3) or not x.size or not np.isfinite(x).all():
        shape = type(map).__name__ if x is None else f"shape {x.shape}"
        broken = "" if x is None or np.isfinite(x).all() else ", with values that are NaN or infinite"
        raise ValueError(f"detect_box takes finite maps, [h, w] or [B, h, w], got {shape}{broken}")
    maps = torch.from_numpy(x.astype(np.float64)).reshape(-1, *x.shape[-2:])
    boxes = [_box_of_one(one, size, threshold, smallest) for one in maps]
    return boxes[0] if x.ndim == 2 else boxes


def box_of(mask: Tensor) -> Box:
    """Find the box of a mask's pixels of at least one half.

    Raises:
        ValueError: there are none.
    """
    rows, columns = (mask >= 0.5).any(1).nonzero(), (mask >= 0.5).any(0).nonzero()
    if not len(rows):
        raise ValueError("empty mask: no pixel of the region is set")
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def check_threshold(threshold: float | str) -> None:
    """Refuse a threshold that is neither "otsu" nor in (0, 1).

    Raises:
        ValueError: it is not.
    """
    if threshold != "otsu" and (isinstance(threshold, str) or not 0 < threshold < 1):
        raise ValueError(f'threshold must be "otsu" or lie in (0, 1), got {threshold!r}')


def _box_of_one(x: Tensor, size: tuple[int, int] | None, threshold: float | str, smallest: float) -> Box | None:
    """Find the box in one map ``[h, w]`` float64."""
    from scipy import ndimage

    check_threshold(threshold)
    if threshold == "otsu":
        if x.min() < 0:
            raise ValueError(f'threshold="otsu" takes logarithms, but the map has {x.min():g}: pass a share in (0, 1)')
        x = x.clamp_min(max(FLOOR * x.max().item(), 1e-300)).log()
    if x.max() == x.min():
        return None
    if size is not None:
        x = torch.nn.functional.interpolate(x[None, None], size, mode="bicubic", align_corners=False)[0, 0]
    level = otsu(x.numpy()) if threshold == "otsu" else float(x.min() + float(threshold) * (x.max() - x.min()))
    hot = (x > level).numpy()
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


def otsu(values: np.ndarray) -> float:
    """Return the threshold between the two groups of values whose means differ most, weighted by size (exact)."""
    x = np.sort(values, axis=None)
    below = np.arange(1, x.size)
    sums = np.cumsum(x)
    apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / (x.size - below)
    i = int(np.argmax(below * (x.size - below) * apart**2))
    return float((x[i] + x[i + 1]) / 2)


def _large_components(hot: np.ndarray, area: float) -> np.ndarray:
    from scipy import ndimage

    labels, _ = ndimage.label(hot)
    sizes = np.bincount(labels.flat)
    sizes[0] = 0
    large: np.ndarray = (sizes >= area)[labels] & hot
    return large
