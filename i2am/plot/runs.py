"""Two runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from i2am.maps import AttributionMaps
from i2am.plot.arrays import as_map, as_picture, check_finite, limits_of
from i2am.plot.labels import meaning, quantity, units, wrap
from i2am.plot.panels import CMAP, SCALES, bare, colorbar_of, draw, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIFFERENCE_CMAP = "RdBu_r"  # diverging, told apart by colour-blind readers; white is no change


def side_by_side(
    first: AttributionMaps,
    second: AttributionMaps,
    direction: str,
    images: Sequence[Any],
    *,
    names: Sequence[str] = ("A", "B"),
    index: int = 0,
    scale: str = "shared",
    cmap: str = CMAP,
    alpha: float = 0.65,
    footer: str | None = None,
    **options,
) -> Figure:
    """Draw two runs' unified maps beside each other, and their difference.

    Args:
        first, second: the runs' maps.
        direction: "r2g", "g2r" or "mass".
        images: what the two maps lie on: two images.
        names: what to call the runs.
        index, cmap, alpha, footer: as in :func:`levels`.
        scale: "shared": one colour scale for both; "each": each from its own minimum to its own maximum.
        **options: of :class:`AttributionMaps`' levels, for both.

    Raises:
        ValueError: a run has no such map; not two images and names; their grids differ (give both one ``size=``).
    """
    from i2am.plot.shown import Figure

    if len(images) != 2 or len(names) != 2:
        raise ValueError(f"two images and two names are compared, got {len(images)} and {len(names)}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    values = [as_map(maps.ulam(direction, **options), index) for maps in (first, second)]
    pictures = [as_picture(image, index) for image in images]
    widths = [p.shape[1] / p.shape[0] for p in (*pictures, pictures[0])]
    figure = Figure(figsize=(8.2, 6.4 / sum(widths) + 0.85), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=widths)
    for ax, picture, x, name in zip(axes, pictures, values, names, strict=False):
        heat = draw(ax, picture, x, cmap, alpha, *limits_of(values if scale == "shared" else [x]))
        ax.set_title(name, fontsize=9)
        if scale == "each" or name is names[1]:
            where = [ax] if scale == "each" else list(axes[:2])
            colorbar_of(figure, heat, where, shrink=0.75, quantity=quantity(direction, options))
    difference(*values, axes[2], title=wrap(f"{names[1]} − {names[0]}", 26), shrink=0.75)
    axes[2].set_aspect("auto")  # the map in the picture's shape, as on the picture
    axes[2].set_box_aspect(pictures[0].shape[0] / pictures[0].shape[1])
    figure.suptitle(f"ULAM · {meaning(first, direction)}", fontsize=9)
    said = "one colour scale for both" if scale == "shared" else "each on its own colour scale"
    said += "; the difference on a symmetric one: red gained, blue lost"
    return note(figure, "\n".join(filter(None, (units(direction, options) + "; " + said, footer))))


def difference(
    before: Tensor | np.ndarray,
    after: Tensor | np.ndarray,
    ax: Axes | None = None,
    *,
    title: str | None = None,
    shrink: float = 1.0,
) -> Axes:
    """Draw what changed between two maps, ``after − before``: red gained, blue lost, white did not change.

    Args:
        before, after: ``[h, w]`` of one grid and one unit.
        ax: where to draw; None makes a figure of its own.
        title: above it.
        shrink: height of the colour bar, of the axes'.

    Raises:
        ValueError: they are not finite, or not on one grid.
    """
    from i2am.plot.shown import single_axes

    a, b = as_map(before, 0), as_map(after, 0)
    if a.shape != b.shape:
        raise ValueError(f"maps on one grid can be subtracted, these are {a.shape} and {b.shape}: give both one size=")
    check_finite(a)
    check_finite(b)
    if ax is None:
        ax = single_axes(4.0, 3.4)
    most = float(np.abs(b - a).max()) or 1.0
    heat = bare(ax).imshow(b - a, cmap=DIFFERENCE_CMAP, vmin=-most, vmax=most, interpolation="bicubic")
    colorbar_of(ax.figure, heat, [ax], shrink, quantity="change")
    if title:
        ax.set_title(wrap(title, 42), fontsize=9)
    return ax
