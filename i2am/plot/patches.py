"""A patch and where it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from i2am._images import one_of, read_mask, read_point
from i2am.maps import AttributionMaps
from i2am.plot.arrays import as_map, as_picture, limits_of, resized
from i2am.plot.panels import CMAP, bare, colorbar_of, draw, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def sram(
    maps: AttributionMaps,
    region: Any,
    generated: Any,
    reference: Any,
    *,
    index: int = 0,
    canvas: tuple[int, int] | None = None,
    cmap: str = CMAP,
    alpha: float = 0.65,
    share: float = 0.5,
    footer: str | None = None,
    **options,
) -> Figure:
    """Draw three panels: the patch marked on the generated image, its SRAM on the reference, and where most of it lies.

    The last one outlines the smallest part of the reference that holds ``share`` of the patch's attention to it.

    Args:
        maps: the attribution maps.
        region: a point ``(y, x)``, a mask, or the name of a registered region, as for :meth:`AttributionMaps.sram`.
        generated, reference: the images; forms: see :func:`overlay`.
        index, cmap, alpha, footer: as in :func:`levels`.
        canvas: in which a point is given, as for :meth:`AttributionMaps.sram`.
        share: in (0, 1).
        **options: of :class:`AttributionMaps`' levels.

    Raises:
        ValueError, IndexError: as :meth:`AttributionMaps.sram`; ``share`` is not in (0, 1).
    """
    from i2am.plot.shown import Figure

    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    values = as_map(maps.sram(region, canvas=canvas, **options), index)
    left, right = as_picture(generated, index), as_picture(reference, index)
    widths = [p.shape[1] / p.shape[0] for p in (left, right, right)]
    figure = Figure(figsize=(7.5, 6.6 / sum(widths) + 0.6), layout="constrained")
    marked, heated, outlined = figure.subplots(1, 3, width_ratios=widths)
    bare(marked).imshow(left)
    _mark(marked, region, canvas or maps.canvas, left.shape[:2], index)
    marked.set_title("patch of the generated image", fontsize=8)
    heat = draw(heated, right, values, cmap, alpha, *limits_of([values]))
    colorbar_of(figure, heat, [heated], shrink=0.75, quantity="share of the patch's attention, a token")
    heated.set_title("SRAM: the reference behind it", fontsize=8)
    bare(outlined).imshow(right)
    smooth = resized(values, right.shape[:2])
    for colour, width in (("black", 2.6), ("white", 1.2)):
        outlined.contour(smooth, levels=[holding(smooth, share)], colors=colour, linewidths=width)
    outlined.set_title(f"outlined: {round(100 * share)} % of that attention", fontsize=8)
    said = "where the marked patch looked on the reference; the colours run from the map's minimum to its maximum"
    return note(figure, "\n".join(filter(None, (said, footer))))


def holding(values: np.ndarray, share: float) -> float:
    """Find the highest level above which a map still holds ``share`` of its sum."""
    ranked = np.sort(values, axis=None)[::-1]
    total = ranked.cumsum()
    return float(ranked[min(int(np.searchsorted(total, share * total[-1])), len(ranked) - 1)])


def _mark(ax: Axes, region: Any, canvas: tuple[int, int], size: tuple[int, int], index: int) -> None:
    """Draw a ring around a point, an outline around a mask, a caption for a name."""
    if isinstance(region, str):
        ax.set_xlabel(f"registered: {region}", fontsize=7)
        return
    point = read_point(region)
    if point is not None:
        y, x = (c * n / m - 0.5 for c, n, m in zip(point, size, canvas, strict=True))
        for colour, width in (("black", 3.2), ("white", 1.4)):
            ax.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)
        return
    masks, single = read_mask(region, weights=True)
    mask = (masks[0] if single or len(masks) == 1 else one_of(masks, index, "masks")).numpy()
    for colour, width in (("black", 2.6), ("white", 1.2)):
        ax.contour(resized(mask, size), levels=[mask.max() / 2], colors=colour, linewidths=width)
