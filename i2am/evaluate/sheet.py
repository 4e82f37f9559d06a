"""Pictures of an evaluation's samples, one strip each. The sheet of the best and the worst: ``contact.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from i2am import plot

if TYPE_CHECKING:
    from PIL.Image import Image

HEIGHT = 192  # pixels of a strip


def as_image(picture: Any) -> Image:
    """Return a PIL image of any form that :func:`i2am.plot.overlay` takes."""
    from PIL import Image

    return Image.fromarray((plot.as_picture(picture, 0) * 255).round().astype(np.uint8))


def preview(generated: Any, r2g: Tensor, reference: Any, g2r: Tensor | None, mask: np.ndarray | Tensor | None) -> Image:
    """Draw a strip: generated image, the same under R2G, reference, the same under G2R (plain where there is none).

    The mask is drawn as a white line on the first.
    """
    from PIL import Image

    panels = [_outlined(generated, mask), plot.blend(generated, r2g), plot.as_picture(reference, 0)]
    if g2r is not None:
        panels.append(plot.blend(reference, g2r))
    pictures = [as_image(p) for p in panels]
    pictures = [p.resize((max(round(p.width * HEIGHT / p.height), 1), HEIGHT), Image.LANCZOS) for p in pictures]
    strip = Image.new("RGB", (sum(p.width for p in pictures) + 4 * (len(pictures) - 1), HEIGHT), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + 4
    return strip


def _outlined(image: Any, mask: np.ndarray | Tensor | None) -> np.ndarray:
    from PIL import Image
    from scipy import ndimage

    picture = plot.as_picture(image, 0).copy()
    if mask is None:
        return picture
    inside = np.asarray(Image.fromarray((np.asarray(mask) * 255).astype(np.uint8)).resize(picture.shape[1::-1])) > 127
    width = max(round(picture.shape[0] / HEIGHT), 1)
    picture[ndimage.binary_dilation(inside, iterations=width) & ~inside] = 1.0
    return picture
