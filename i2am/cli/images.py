"""Input images of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.cli.arguments import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from i2am.evaluate.sources import Picture

IMAGE_OPTIONS = {"reference": "RGB", "image": "RGB", "mask": "L", "control_image": "RGB"}


def open_image(what: str, picture: Picture | None, mode: str) -> Image | None:
    """Open the image of a file, or of one inside a shard or table, upright and in 8 bits.

    Args:
        what: names it in errors.
        picture: None stays None.
        mode: "RGB", or "L" of a mask: 255 inside.

    Raises:
        UserError: there is no such file, it is no image, or its values have no known meaning.
    """
    from i2am import _images

    if picture is None:
        return None
    try:
        image = _images.open_image(picture if isinstance(picture, Path) else io.BytesIO(picture.read_bytes()))
        return _images.as_mask_image(image) if mode == "L" else _images.as_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{what}: there is no file {picture}") from None
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{picture} cannot be read as an image: ").removeprefix("this ")
        raise UserError(f"{what}: {picture} cannot be read as an image: {reason}") from error


def fit_images(images: dict[str, Image | None], size: tuple[int, int] | None) -> dict[str, Image | None]:
    """Return the input images at one size: the one asked for, else the first one's own in multiples of 8.

    Not the reference: its encoder has a size of its own.
    """
    from PIL.Image import Resampling

    inputs = [option for option in ("image", "control_image", "mask") if images.get(option) is not None]
    if not inputs:
        return images
    width, height = images[inputs[0]].size
    height, width = size or (max(height // 8, 1) * 8, max(width // 8, 1) * 8)
    fitted = {
        option: images[option].resize((width, height), Resampling.NEAREST if option == "mask" else Resampling.LANCZOS)
        for option in inputs
        if images[option].size != (width, height)
    }
    return images | fitted


SQUEEZED = ("StableVideoDiffusion",)  # pipelines that scale the whole picture by themselves before the processor
CUT_LIKE_OUTPUT = ("I2VGenXL",)  # pipelines that cut the picture's centre to the proportions of what they make


def part_seen(reference: Image, pipe: Any, generated: Image | Sequence[Image]) -> Image:
    """Return the part of a reference that the pipeline's image encoder sees, and that the G2R maps lie on.

    CLIP's image processors scale the shorter side and cut out the centre; others scale the whole image.
    """
    name = type(pipe).__name__
    if name.startswith(SQUEEZED):
        return reference
    if name.startswith(CUT_LIKE_OUTPUT):
        return _cut_like(reference, generated[0] if isinstance(generated, Sequence) else generated)
    names = ("feature_extractor", "image_feature_extractor", "image_processor")
    processors = (getattr(pipe, name, None) for name in names)
    processor = next((p for p in processors if getattr(p, "do_center_crop", False)), None)
    shorter = (getattr(processor, "size", None) or {}).get("shortest_edge")
    if processor is None or not shorter:
        return reference
    scale = min(reference.size) / shorter
    width, height = (
        min(round(processor.crop_size[side] * scale), n)
        for side, n in zip(("width", "height"), reference.size, strict=True)
    )
    return _centre(reference, width, height)


def _cut_like(picture: Image, other: Image) -> Image:
    scale = min(picture.width / other.width, picture.height / other.height)
    return _centre(picture, round(other.width * scale), round(other.height * scale))


def _centre(picture: Image, width: int, height: int) -> Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
