"""Images and maps of any form as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_PIXELS = 320  # small multiples hold their image at this size: they are printed smaller than that


def one_of(batch, index: int, what: str):
    if not -len(batch) <= index < len(batch):
        raise IndexError(f"index={index}, but there are {len(batch)} {what}")
    return batch[index]


def as_map(map: Tensor | np.ndarray, index: int) -> np.ndarray:
    """``[h, w]`` float32 of a map or of one in a batch."""
    values = map.detach().cpu().float().numpy() if isinstance(map, Tensor) else np.asarray(map, dtype=np.float32)
    if values.ndim == 3:
        values = one_of(values, index, "maps")
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map must be [h, w] or a batch [B, h, w], got shape {tuple(values.shape)}")
    return values


def as_picture(image: Any, index: int) -> np.ndarray:
    """``[H, W, 3]`` float in 0…1 of any of the forms that :func:`overlay` takes."""
    if isinstance(image, (list, tuple)):
        image = one_of(image, index, "images")
    if hasattr(image, "convert"):  # PIL
        pixels = np.asarray(image.convert("RGB"))
    elif isinstance(image, Tensor):
        pixels = image.detach().cpu().movedim(-3, -1).numpy() if image.ndim > 2 else image.detach().cpu().numpy()
    else:
        pixels = np.asarray(image)
    if pixels.ndim == 4:
        pixels = one_of(pixels, index, "images")
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(3, axis=-1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or pixels.dtype.kind not in "uf" or not pixels.size:
        raise ValueError(
            "an image must be a PIL image, an array [H, W, 3] or a tensor [3, H, W] (or a batch), uint8 or float; got "
            f"{type(image).__name__} of shape {tuple(getattr(image, 'shape', ()))}"
        )
    pixels = pixels[..., :3].repeat(3 if pixels.shape[-1] == 1 else 1, axis=-1)
    if pixels.dtype.kind == "u":
        return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    pixels = pixels.astype(np.float32)
    if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
        raise ValueError(f"a float image must lie in 0…1, got {pixels.min():.3g}…{pixels.max():.3g}")
    return pixels.clip(0, 1)


def grey(picture: np.ndarray) -> np.ndarray:
    """Rec. 601 luma, as three equal channels."""
    return (picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None].repeat(3, axis=-1)


def shrunk(picture: np.ndarray) -> np.ndarray:
    """At most PANEL_PIXELS on the longer side."""
    height, width = picture.shape[:2]
    longer = max(height, width)
    if longer <= PANEL_PIXELS:
        return picture
    size = [max(round(n * PANEL_PIXELS / longer), 1) for n in (height, width)]
    pixels = torch.from_numpy(picture).movedim(-1, 0)[None]
    return F.interpolate(pixels, size, mode="area")[0].movedim(0, -1).numpy()


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[h, w]`` → ``size``, bicubic as for the maps' common grid, never beyond the values there are."""
    grid = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    smooth = F.interpolate(grid, size, mode="bicubic", align_corners=False)[0, 0].numpy()
    return smooth.clip(values.min(), values.max())


def limits_of(
    panels: Sequence[np.ndarray], vmin: float | None = None, vmax: float | None = None
) -> tuple[float, float]:
    """Ends of a colour scale over some maps, never equal (a constant map is drawn in the lowest colour)."""
    if vmin is not None and vmax is not None and vmin >= vmax:
        raise ValueError(f"vmin must be below vmax, got {vmin} and {vmax}")
    low = min((float(p.min()) for p in panels), default=0.0) if vmin is None else vmin
    high = max((float(p.max()) for p in panels), default=1.0) if vmax is None else vmax
    return low, high if high > low else low + (abs(low) or 1.0)
