"""Pictures of an evaluation: one strip a sample, and a sheet of the best and the worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from i2am import plot
from i2am.evaluate.scores import MEANING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from i2am.evaluate.store import Store

HEIGHT = 192  # pixels of a strip
SHOWN = 5  # best, and worst


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


def contact_sheet(
    best: Sequence[dict[str, Any]], worst: Sequence[dict[str, Any]], count: int, by: str, store: Store
) -> Figure:
    """Draw the best and worst of ``count`` samples by one score, each with its strip and all its scores."""
    from matplotlib.figure import Figure
    from PIL import Image

    chosen = [*best, *worst]
    titles = ["best"] * len(best) + ["worst"] * len(worst)
    strips = [Image.open(store.path("previews", record["id"], ".jpg")) for record in chosen]
    width = min(max(1.3 * max(strip.width / strip.height for strip in strips), 5.0), 9.0)  # inches, a row 1.3 high
    figure = Figure(figsize=(width + 0.2, 1.55 * len(titles) + 0.9), layout="constrained")
    axes = figure.subplots(len(titles), 1, squeeze=False)[:, 0]
    for ax, title, record, strip in zip(axes, titles, chosen, strips, strict=True):
        ax.imshow(strip)
        ax.set_axis_off()
        scores = "   ".join(f"{MEANING[name][0]} {plot.signed(record[name])}" for name in MEANING if name in record)
        ax.set_title(f"{title} · {record['id']} · {scores}", fontsize=7, loc="left")
    figure.suptitle(f"Best and worst of {count} samples by {MEANING[by][0]}", fontsize=10)
    return plot.note(figure, "generated (mask outlined), R2G on it, reference, G2R on it; each map on its own scale")
