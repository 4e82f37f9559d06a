"""Pictures, masks and points, in every form that people have them in, read in one place for the whole package.

A number's meaning depends on its kind: 255 of 8 bits, 65535 of 16, 1.0 of floats. What has no known scale (labels of a
palette, a mask in the alpha channel, integers of 32 bits) is refused with the value that was seen, never guessed.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow may open: pictures, and nothing that starts another program (Ghostscript for EPS and PDF).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "AVIF", "MPO")
BITS = {8: 255, 16: 65535}
WIDER = 16  # pixels that a picture has each way, where an axis of 2 to 4 behind them is its channels
MILLISECONDS = 125  # a frame of a generated video
SLACK = 1e-3  # by which resizing or half precision may leave 0…1


# ------------------------------------------------------------------------------------------------------------ files


def open_image(path: Path | BinaryIO) -> Image:
    """Open an image file (or one that is open), upright as its EXIF says, of one of the kinds in ``FORMATS``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image of these kinds, damaged, or too large to be one.
    """
    import PIL.Image
    from PIL import ImageOps

    if isinstance(path, Path) and not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    PIL.Image.init()
    known = [kind for kind in FORMATS if kind in PIL.Image.OPEN]
    try:
        with PIL.Image.open(path, formats=known) as image:
            kind = image.format
            upright = ImageOps.exif_transpose(image)
            upright.load()
    except PIL.UnidentifiedImageError:
        raise ValueError(f"{_name(path)} is not an image of a known kind ({', '.join(known)})") from None
    except Exception as error:  # of a damaged file Pillow's readers raise whatever they stumble on
        raise ValueError(f"{_name(path)} cannot be read as an image: {error}") from error
    upright.format = kind
    return upright


def _name(file: Path | BinaryIO) -> str:
    return str(file) if isinstance(file, Path) else "this"


def as_rgb(image: Image) -> Image:
    """Return an image as 8-bit RGB, scaled by the range of its kind; alpha is dropped, as pipelines do."""
    import PIL.Image

    if image.mode in _SCALED_BY_PILLOW:
        return image.convert("RGB")
    grey = (_grey_of_deep(image) * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(grey).convert("RGB")


def as_mask_image(image: Image) -> Image:
    """Return a mask image as 8-bit grey, 255 inside, read by what its values mean; see :func:`read_mask`."""
    import PIL.Image

    return PIL.Image.fromarray((_mask_of_image(image) * 255).round().astype(np.uint8))


# --------------------------------------------------------------------------------------------------------- pictures


def read_picture(image: Any, index: int = 0) -> np.ndarray:
    """Return a picture as ``[H, W, 3]`` float32 in 0…1.

    Args:
        image: a PIL image of any mode; an array or tensor ``[H, W]``, ``[H, W, C]``, ``[C, H, W]`` or a batch of these,
            of C = 1, 3 or 4 channels; or a sequence of images. Integers count by their bits (0…255, 0…65535), bool and
            floats of any precision are 0…1.
        index: which one of a batch or sequence.

    Raises:
        ValueError: no picture, or values outside its kind's range.
        IndexError: ``index`` is outside the batch.
    """
    if isinstance(image, (list, tuple)):
        image = one_of(image, index, "images")
    if is_pil(image):
        return np.asarray(as_rgb(image), dtype=np.float32) / 255
    x = as_array(image)
    if x is not None and x.ndim == 4:
        x = one_of(x, index, "images")
    x = None if x is None or not x.size else _channels_last(x, first=isinstance(image, Tensor))
    if x is None:
        raise ValueError(
            "an image must be a PIL image, or an array or tensor [H, W], [H, W, C] or [C, H, W] of 1, 3 or 4 channels "
            f"(or a batch), got {type(image).__name__} of shape {tuple(getattr(image, 'shape', ()))}"
        )
    x = _scaled(x, "image")
    x = x[..., None] if x.ndim == 2 else x[..., :3]
    return np.ascontiguousarray(x.repeat(3, axis=-1) if x.shape[-1] == 1 else x)


def save_film(frames: Iterable[Image], path: Path) -> None:
    """Write a video as an animated WebP."""
    first, *others = frames
    options = {"save_all": True, "append_images": others, "duration": MILLISECONDS, "loop": 0, "quality": 90}
    first.save(path, "WEBP", **options)


def pictures_of(video: Any, frames: int, index: int = 0, lead: int = 0) -> list[Any]:
    """Return the picture of each of ``frames`` latent frames: of a video of as many, or of more in even steps.

    Args:
        video: a sequence of pictures or an array of them; a batch of such; or one picture, which is every frame's.
        frames: of the latents, which compress time: 21 of a video of 81.
        index: which video of a batch.
        lead: further latent frames of the video that were given, and come before these.

    Raises:
        ValueError: so many pictures are no video of so many latent frames.
    """
    shape = () if is_pil(video) or isinstance(video, (list, tuple)) else tuple(getattr(video, "shape", ()))
    if (isinstance(video, (list, tuple)) and video and isinstance(video[0], (list, tuple))) or len(shape) == 5:
        video = one_of(video, index, "videos")
    elif not isinstance(video, (list, tuple)) and len(shape) != 4:
        return [video] * frames
    elif isinstance(video, (list, tuple)) and len(getattr(video[0], "shape", ())) == 4:
        video = one_of(video, index, "videos")
    count = len(video)
    if count == frames:
        return list(video)
    total = lead + frames
    if total > 1 and count >= total and (count - 1) % (total - 1) == 0:
        return [video[i * (count - 1) // (total - 1)] for i in range(lead, total)]
    given = f", {lead} of which are given" if lead else ""
    raise ValueError(
        f"{count} pictures are no video of {total} latent frames{given}: give {frames}, or all of the video"
    )


def _channels_last(x: np.ndarray, first: bool) -> np.ndarray | None:
    """Move channels last: of ``[H, W, C]`` or ``[C, H, W]``, the latter tried ``first``. None: it has none."""
    if x.ndim == 2:
        return x
    for axis, sides in ((0, x.shape[1:]), (-1, x.shape[:2])) if first else ((-1, x.shape[:2]), (0, x.shape[1:])):
        expected = (axis == 0) == first
        if x.ndim == 3 and x.shape[axis] in (1, 3, 4) and (expected or min(sides) > 4):
            return np.moveaxis(x, axis, -1)
    return None


# ------------------------------------------------------------------------------------------------------------ masks


def read_mask(mask: Any, *, weights: bool = False) -> tuple[Tensor, bool]:
    """Return masks as ``[B, H, W]`` float32 in 0…1, and whether one alone was given.

    Args:
        mask: a PIL image; an array or tensor ``[H, W]``, ``[H, W, 1]``, or a batch ``[B, H, W]``, ``[B, 1, H, W]`` or
            ``[B, H, W, 1]``; or a sequence of masks of one size. Bool and floats are 0…1 (soft values are kept);
            integers are 0 and 1, or 0…255, or 0…65535.
        weights: take finite floats of any scale that are not negative: what is asked is where, not how much.

    Raises:
        ValueError: values without a known meaning, which it names: integers whose largest is less than half of their
            range, colours, a palette of labels, partial transparency, floats outside 0…1.
    """
    if isinstance(mask, (list, tuple)) and mask and (is_pil(mask[0]) or getattr(mask[0], "ndim", 0) >= 2):
        found = [read_mask(m, weights=weights)[0] for m in mask]
        if len({m.shape[1:] for m in found}) > 1:
            raise ValueError(f"masks of one size are one batch, these are {[tuple(m.shape[1:]) for m in found]}")
        return torch.cat(found), False
    if is_pil(mask):
        return torch.from_numpy(_mask_of_image(mask))[None], True
    x = as_array(mask)
    if x is None or x.dtype.kind not in "buif":
        raise ValueError(f"a mask must be a PIL image, an array or a tensor, got {type(mask).__name__}")
    if x.ndim == 3 and x.shape[-1] in (3, 4) and x.dtype == np.uint8 and min(x.shape[:2]) > 4:
        return torch.from_numpy(_grey_of_colours(x, "array"))[None], True  # np.asarray of a colour image
    if x.ndim == 3 and x.shape[-1] in (2, 3, 4) and min(x.shape[:2]) > WIDER:  # the same of another dtype
        x = _first_of_equal_channels(x)
    single = x.ndim == 2 or (x.ndim == 3 and x.shape[-1] == 1)
    if x.ndim in (3, 4) and x.shape[-1] == 1:
        x = x[..., 0]
    elif x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim not in (2, 3) or not x.size:
        raise ValueError(f"a mask must be [H, W] or a batch [B, H, W], got shape {tuple(np.shape(mask))}")
    values = _scaled(x, "mask", weights=weights).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values if values.ndim == 3 else values[None])), single


def one_mask(mask: Any, index: int = 0) -> Tensor:
    """Return one mask ``[H, W]`` float32 of what :func:`read_mask` takes; a single one is every image's."""
    masks, single = read_mask(mask)
    found: Tensor = masks[0] if single or len(masks) == 1 else one_of(masks, index, "masks")
    return found


def _mask_of_image(image: Image) -> np.ndarray:
    """Return ``[H, W]`` float32 in 0…1 of a PIL mask."""
    mode = image.mode
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise ValueError(
                f"a mask of mode {mode} with transparent pixels (alpha down to {alpha.min()}): is its alpha meant, or "
                'its colour? Give one of them: image.getchannel("A"), or image.convert("RGB").convert("L")'
            )
    if mode in _DEEP:
        return _scaled(np.asarray(image), "mask").astype(np.float32)
    if mode == "1":
        return np.asarray(image, dtype=np.float32)
    if mode == "L":
        return _scaled(np.asarray(image), "mask")
    return _grey_of_colours(np.asarray(image.convert("RGB")), f"mode {mode}")


def _grey_of_colours(pixels: np.ndarray, what: str) -> np.ndarray:
    """Return ``[H, W]`` in 0…1 of colours that are greys; labels of a palette are not."""
    if pixels.shape[-1] == 4 and pixels[..., 3].min() < 255:
        raise ValueError("a mask with transparent pixels: give its alpha or its colour, [H, W]")
    colours = pixels[..., :3].astype(np.int16)
    spread = np.ptp(colours, axis=-1)
    if spread.max() > 16:  # JPEG tints greys a little
        y, x = np.unravel_index(spread.argmax(), spread.shape)
        raise ValueError(
            f"a mask of {what} with colours, {tuple(colours[y, x].tolist())} at row {y}, column {x}: are these labels? "
            "Make a mask of the one that is meant: labels == value"
        )
    return _scaled(colours.mean(-1).round().astype(np.uint8), "mask")


def _first_of_equal_channels(x: np.ndarray) -> np.ndarray:
    """Return ``[H, W]`` of a mask ``[H, W, 3]`` whose channels are alike.

    Raises:
        ValueError: they are not, or there is an alpha channel: nothing tells which is meant.
    """
    if x.shape[-1] == 3 and np.array_equal(x[..., :1].repeat(2, axis=-1), x[..., 1:]):
        found: np.ndarray = x[..., 0]
        return found
    raise ValueError(
        f"a mask of shape {x.shape} is a picture of {x.shape[-1]} channels that differ: give the one that is meant, "
        f"[H, W]; {x.shape[0]} masks that are {x.shape[-1]} pixels wide are [B, 1, H, W]"
    )


# ----------------------------------------------------------------------------------------------------------- points


def read_point(region: Any) -> tuple[float, float] | None:
    """Return ``(y, x)`` of any pair of numbers (tuple, list, array, tensor; Python's or numpy's); None: no pair.

    Raises:
        ValueError: a pair with NaN or infinity.
    """
    if isinstance(region, (Tensor, np.ndarray)):
        if tuple(region.shape) != (2,):
            return None
        region = region.tolist()
    if not isinstance(region, Sequence) or isinstance(region, (str, bytes)) or len(region) != 2:
        return None
    pair = [x.item() if isinstance(x, (Tensor, np.generic, np.ndarray)) and not np.shape(x) else x for x in region]
    if not all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in pair):
        return None
    y, x = float(pair[0]), float(pair[1])
    if not (np.isfinite(y) and np.isfinite(x)):
        raise ValueError(f"a point (y, x) must be finite, got ({y}, {x})")
    return y, x


# ----------------------------------------------------------------------------------------------------------- arrays

_SCALED_BY_PILLOW = ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "La", "PA", "CMYK", "YCbCr", "LAB", "HSV")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # convert("RGB") clips these instead of scaling them


def is_pil(image: Any) -> bool:
    return hasattr(image, "convert") and hasattr(image, "mode")


def as_array(x: Any) -> np.ndarray | None:
    """Return numbers of any form as an array; bfloat16 and float8 as float32. None: these are no numbers.

    Raises:
        ValueError: a tensor without plain numbers, such as a sparse one.
    """
    if isinstance(x, Tensor):
        kinds = {
            "nested": x.is_nested,
            "quantised": x.is_quantized,
            "complex": x.is_complex(),
            "without values": x.is_meta,
        }
        if x.layout != torch.strided or any(kinds.values()):
            what = next((kind for kind, it_is in kinds.items() if it_is), "sparse")
            raise ValueError(f"a tensor that is {what} cannot be read: pass a dense one of real numbers")
        x = x.detach().cpu()
        found: np.ndarray = (x.float() if x.dtype.is_floating_point and x.dtype != torch.float64 else x).numpy()
        return found
    try:
        array = np.asarray(x)
    except ValueError:  # ragged lists
        return None
    if array.dtype.kind == "V" or str(array.dtype) == "bfloat16":
        array = array.astype(np.float32)
    return array if array.dtype.kind in "buif" else None


def one_of(batch: Any, index: int, what: str) -> Any:
    """Return ``batch[index]``.

    Raises:
        IndexError: there is no such one; says how many there are.
    """
    if not -len(batch) <= index < len(batch):
        raise IndexError(f"index={index}, but there are {len(batch)} {what}")
    return batch[index]


def _grey_of_deep(image: Image) -> np.ndarray:
    """Return ``[H, W]`` in 0…1 of an image of 16 or 32 bits a pixel."""
    if image.mode not in _DEEP:
        raise ValueError(f"an image of mode {image.mode} has no known scale: convert it to RGB first")
    x = np.asarray(image)
    if image.mode == "I" and 1 < x.max() <= 255 and image.format != "PNG":
        raise ValueError(f"an image of 32-bit integers up to {x.max()} has no known scale: convert it to 8 or 16 bits")
    if image.mode == "I" and x.min() >= 0 and x.max() <= BITS[16]:
        x = x.astype(np.uint16)
    return _scaled(x, "image")


def _scaled(x: np.ndarray, what: str, weights: bool = False) -> np.ndarray:
    """Return the numbers of a picture or mask in 0…1, by their kind."""
    if x.dtype.kind == "b":
        return x.astype(np.float32)
    low, high = x.min(), x.max()
    if x.dtype.kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{what} values must be finite and lie in 0…1, got {low:.3g}…{high:.3g}")
        if weights:
            if low < 0:
                raise ValueError(f"a mask must be finite and not negative, got {low:.3g}…{high:.3g}")
            return x
        if not (low >= -SLACK and high <= 1 + SLACK):
            hint = "; for a picture in −1…1, (x + 1) / 2" if -1 - SLACK <= low < 0 and high <= 1 + SLACK else ""
            raise ValueError(f"{what} values must lie in 0…1, [0, 1], got {low:.3g}…{high:.3g}{hint}")
        clipped: np.ndarray = np.clip(x.astype(np.float32), 0, 1)
        return clipped
    if low < 0 or high > BITS[16]:
        raise ValueError(f"{what} values are integers {low}…{high}: expected 0…1 of floats, 0…255 or 0…65535")
    if what == "mask" and high <= 1:
        return x.astype(np.float32)
    top = BITS[16] if x.dtype == np.uint16 or high > BITS[8] else BITS[8]
    if what == "mask" and high < top / 2:
        raise ValueError(
            f"the largest value of this mask is {high} of {top}: are these labels? Make a mask of the one that is "
            "meant: labels == value"
        )
    return x.astype(np.float32) / np.float32(top)
