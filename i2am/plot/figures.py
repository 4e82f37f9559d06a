"""One run's maps on their images: one map, a level, both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from i2am._images import one_of
from i2am.maps import AXES, LEVELS, AttributionMaps
from i2am.maps.names import level_of
from i2am.plot.arrays import as_map, as_picture, check_finite, grey, limits_of, refuse_swapped, resized
from i2am.plot.labels import meaning, panel_labels, quantity, units, wrap
from i2am.plot.panels import CMAP, SCALES, balanced, bare, colorbar_of, draw, grid, instead, note
from i2am.references import SELF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = {"time": 5, "head": 4, "layer": 5}


def overlay(
    image: Any,
    map: Tensor | np.ndarray,
    ax: Axes | None = None,
    *,
    index: int = 0,
    cmap: str = CMAP,
    alpha: float = 0.65,
    vmin: float | None = None,
    vmax: float | None = None,
    colorbar: bool = True,
    title: str | None = None,
    quantity: str | None = None,
) -> Axes:
    """Draw a map over the image that it is about, resized smoothly (bicubic) to the image.

    The photograph is shown in grey under the map, so that every hue is the map's.

    Args:
        image: a PIL image of any mode; an array or tensor ``[H, W]``, ``[H, W, 3]``, ``[3, H, W]`` or a batch of these;
            or a list of images. Integers count by their bits (0…255, 0…65535), floats of any precision are 0…1.
        map: ``[h, w]``, or a batch ``[B, h, w]`` of them; any resolution.
        ax: where to draw; None makes a figure of its own (``ax.figure``).
        index: which one of a batch, of maps and of images alike.
        cmap: a matplotlib colour map.
        alpha: opacity of the map, 0…1.
        vmin, vmax: values of the colour map's ends. None: the map's own minimum and maximum.
        colorbar: whether to draw one.
        title: above the image.
        quantity: what the colour bar measures, written beside it.

    Raises:
        ValueError: not an image or a map of these shapes, or the two swapped; the map is not finite (a time group
            without a step); ``vmin`` is not below ``vmax``.
        IndexError: ``index`` is outside the batch.
    """
    refuse_swapped(image, map)
    picture, values = as_picture(image, index), as_map(map, index)
    check_finite(values)
    if ax is None:
        from i2am.plot.shown import single_axes

        height, width = picture.shape[:2]
        ax = single_axes(4.6, 4.0 * height / width + 0.3)
    heat = draw(ax, picture, values, cmap, alpha, *limits_of([values], vmin, vmax))
    if colorbar:
        colorbar_of(ax.figure, heat, [ax], quantity=quantity)
    if title:
        ax.set_title(wrap(title, 42), fontsize=9)
    return ax


def levels(
    maps: AttributionMaps,
    direction: str,
    image: Any,
    level: str = "time",
    *,
    index: int = 0,
    scale: str | None = None,
    cmap: str = CMAP,
    alpha: float = 0.65,
    columns: int | None = None,
    footer: str | None = None,
    **options,
) -> Figure:
    """Draw all maps of one level, each over the image: a filmstrip of time groups, or a grid of heads or layers.

    Args:
        maps: the attribution maps.
        direction: "r2g", "g2r" or "mass".
        image: what the maps lie on: the generated image; for "g2r" the reference. Forms: see :func:`overlay`.
        level: "time" (TLAM), "head" (HLAM) or "layer" (LLAM).
        index: which sample of a batch.
        scale: "shared": one colour scale for all panels; "each": every panel from its own minimum to its own maximum,
            written under it. None: shared, but each for layers, whose raw values scale with their resolution. The
            figure says which.
        cmap, alpha: see :func:`overlay`.
        columns: panels a row. None: what reads well.
        footer: a note below the figure.
        **options: of :class:`AttributionMaps`' levels: ``reference``, ``layers``, ``heads``, ``times``, ``normalize``.

    Raises:
        ValueError: there is no such map (as the maps say), or an argument is not one of the above.
    """
    if level not in AXES:
        raise ValueError(f"level must be one of {', '.join(AXES)}, got {level!r}")
    scale = scale or ("each" if level == "layer" else "shared")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    name = level_of(level)
    batch = getattr(maps, name)(direction, **options)
    panels = list(one_of(batch, index, "maps").numpy())
    labels = panel_labels(maps, direction, level, options)
    said = "one colour scale for all" if scale == "shared" else "each panel on its own colour scale: range below it"
    return grid(
        as_picture(image, index),
        panels,
        labels,
        columns or balanced(len(panels), MOST_COLUMNS[level]),
        shared=scale == "shared",
        cmap=cmap,
        alpha=alpha,
        title=f"{name.upper()} ({LEVELS[name].several}) · {meaning(maps, direction)}",
        footer="\n".join(filter(None, (units(direction, options) + "; " + said, footer))),
        quantity=quantity(direction, options),
    )


def summary(
    maps: AttributionMaps,
    generated: Any,
    reference: Any,
    *,
    reference_name: str | None = None,
    index: int = 0,
    cmap: str = CMAP,
    alpha: float = 0.65,
    footer: str | None = None,
    **options,
) -> Figure:
    """Draw both directions in one figure: the generated image with ULAM R2G, the reference with ULAM G2R.

    A reference without a map of its own (one token, or tokens without a 2-D layout) gets a note that says so.

    Args:
        maps: the attribution maps.
        generated, reference: the images; forms: see :func:`overlay`.
        reference_name: which of ``maps.references``, where there are several.
        index, cmap, alpha, footer: as in :func:`levels`.
        **options: of :class:`AttributionMaps`' levels: ``layers``, ``heads``, ``times``, ``normalize``, ``size``.

    Raises:
        ValueError: an option selects no map; several references and no name.
    """
    from i2am.plot.shown import Figure

    options["reference"] = reference_name
    other = "generated" if maps.references == [SELF] else "reference"
    rows = [("generated", "r2g", as_picture(generated, index)), (other, "g2r", as_picture(reference, index))]
    found = {"r2g": maps.ulam("r2g", **options), "g2r": _or_reason(maps, "g2r", options)}
    heights = [min(3.0 * picture.shape[0] / picture.shape[1], 4.0) for _, _, picture in rows]  # inches
    figure = Figure(figsize=(7.0, sum(heights) + 1.3), layout="constrained")
    axes = figure.subplots(2, 2, squeeze=False, height_ratios=heights)
    for (name, direction, picture), (plain, mapped) in zip(rows, axes, strict=True):
        bare(plain).imshow(picture)
        plain.set_title(name, fontsize=9)
        if isinstance(found[direction], str):
            instead(mapped, "no 2-D layout, no G2R map", found[direction])
            continue
        ulam = one_of(found[direction], index, "maps")
        says = {"title": meaning(maps, direction), "quantity": quantity(direction, options)}
        overlay(picture, ulam, mapped, cmap=cmap, alpha=alpha, **says)
    figure.suptitle("ULAM: attribution over all time groups, heads and layers", fontsize=10)
    note(
        figure, "\n".join(filter(None, (units("r2g", options) + "; each map from its minimum to its maximum", footer)))
    )
    return figure


def blend(
    image: Any,
    map: Tensor | np.ndarray,
    *,
    cmap: str = CMAP,
    alpha: float = 0.65,
    vmin: float | None = None,
    vmax: float | None = None,
) -> np.ndarray:
    """Return :func:`overlay` as pixels, without a figure: ``[H, W, 3]`` in 0…1, on the map's own scale unless given."""
    from matplotlib import colormaps

    refuse_swapped(image, map)
    picture, values = as_picture(image, 0), as_map(map, 0)
    check_finite(values)
    low, high = limits_of([values], vmin, vmax)
    heat = colormaps[cmap]((resized(values, picture.shape[:2]) - low) / (high - low))[..., :3]
    return (1 - alpha) * grey(picture) + alpha * heat.astype(np.float32)


def thumbnail(maps: AttributionMaps, *, cmap: str = CMAP) -> bytes:
    """Draw a PNG of the ULAMs alone, both directions, of the first image and reference, as notebooks show maps."""
    import io

    from matplotlib.figure import Figure

    options = {"reference": maps.references[0]}
    found = {d: _or_reason(maps, d, options) for d in ("r2g", "g2r")}
    panels = {d: x[0].numpy() for d, x in found.items() if not isinstance(x, str)}
    figure = Figure(figsize=(3.2 * len(panels), 2.9), layout="constrained")
    for ax, (direction, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        low, high = limits_of([values])
        heat = bare(ax).imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="bicubic")
        colorbar_of(figure, heat, [ax], quantity=quantity(direction, options))
        ax.set_title(wrap(meaning(maps, direction), 40), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _or_reason(maps: AttributionMaps, direction: str, options: dict) -> Tensor | str:
    """Return ULAM, or why there is none."""
    try:
        return maps.ulam(direction, **options)
    except ValueError as error:
        return str(error)
