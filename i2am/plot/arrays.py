"""Images and maps of any form as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2am._images import as_array, is_pil, one_of, read_picture

PANEL_PIXELS = 320  # small multiples hold their image at this size: they are printed smaller than that


def as_map(map: Tensor | np.ndarray, index: int) -> np.ndarray:
    """Return one map ``[h, w]`` float32, of a map or of a batch of them.

    Raises:
        ValueError: not maps; a picture in the place of a map says so.
        IndexError: ``index`` is outside the batch.
    """
    values = None if is_pil(map) else as_array(map)
    if values is None or _has_colours(values):
        raise ValueError(
            f"a map must be [h, w] or a batch [B, h, w], got a picture ({type(map).__name__}): are image and map "
            "swapped? The image comes first"
        )
    if values.ndim == 3:
        values = one_of(values, index, "maps")
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map must be [h, w] or a batch [B, h, w], got shape {tuple(values.shape)}")
    return values.astype(np.float32)


def check_finite(values: np.ndarray) -> None:
    """Refuse a map with NaN or infinity."""
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise ValueError(
            f"the map is not finite: {broken} of its {values.size} values are NaN or infinite (a level is NaN for a "
            "time group in which nothing ran)"
        )


def refuse_swapped(image: Any, map: Any) -> None:
    """Refuse an image that looks like a map before a map that looks like an image: ``overlay(map, image)``.

    Raises:
        ValueError: both look like the other.
    """
    first, second = (None if is_pil(x) or isinstance(x, (list, tuple)) else as_array(x) for x in (image, map))
    if first is None or first.dtype.kind != "f" or not (first.ndim == 2 or (first.ndim == 3 and first.shape[0] == 1)):
        return
    if second is not None and not _has_colours(second) and second.dtype.kind != "u":
        channels_first = (second.ndim == 3 and second.shape[0] in (3, 4)) or second.ndim == 4
        if not channels_first or second.shape[-1] <= first.shape[-1] or second.shape[-2] <= first.shape[-2]:
            return
    raise ValueError(
        f"image and map look swapped: the first argument is one map of shape {first.shape}, the second a picture "
        f"({type(map).__name__}); the image comes first"
    )


def _has_colours(x: np.ndarray) -> bool:
    """Tell whether an array is a picture of bytes, or a batch of them, rather than maps."""
    return x.dtype == np.uint8 and x.ndim in (3, 4) and (x.shape[-1] in (3, 4) or x.shape[-3] in (3, 4))


def as_picture(image: Any, index: int) -> np.ndarray:
    """Return ``[H, W, 3]`` float32 in 0…1 of any of the forms that :func:`overlay` takes."""
    return read_picture(image, index)


def grey(picture: np.ndarray) -> np.ndarray:
    """Return Rec. 601 luma as three equal channels."""
    return (picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None].repeat(3, axis=-1)


def shrunk(picture: np.ndarray) -> np.ndarray:
    """Shrink to at most PANEL_PIXELS on the longer side."""
    height, width = picture.shape[:2]
    longer = max(height, width)
    if longer <= PANEL_PIXELS:
        return picture
    size = [max(round(n * PANEL_PIXELS / longer), 1) for n in (height, width)]
    pixels = torch.from_numpy(picture).movedim(-1, 0)[None]
    return F.interpolate(pixels, size, mode="area")[0].movedim(0, -1).numpy()


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize ``[h, w]`` to ``size``, bicubic as for the maps' common grid, never beyond the values there are."""
    grid = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    smooth = F.interpolate(grid, size, mode="bicubic", align_corners=False)[0, 0].numpy()
    return smooth.clip(values.min(), values.max())


def limits_of(
    panels: Sequence[np.ndarray], vmin: float | None = None, vmax: float | None = None
) -> tuple[float, float]:
    """Return ends of a colour scale over some maps, never equal (a constant map is drawn in the lowest colour)."""
    if vmin is not None and vmax is not None and vmin >= vmax:
        raise ValueError(f"vmin must be below vmax, got {vmin} and {vmax}")
    low = min((float(p.min()) for p in panels), default=0.0) if vmin is None else vmin
    high = max((float(p.max()) for p in panels), default=1.0) if vmax is None else vmax
    return low, high if high > low else low + (abs(low) or 1.0)
