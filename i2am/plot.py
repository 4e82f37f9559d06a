"""Figures of attribution maps: on their image, at every level, in both directions.

Every function takes or makes an Axes or a Figure and hands it back; none opens a window, switches the backend or
touches pyplot's list of figures. ``figure.savefig(...)`` writes it, a notebook shows it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.layout import choose_layers
from i2am.levels import pick
from i2am.maps import AttributionMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CMAP = "inferno"  # perceptually even, told apart by colour-blind readers and in grey print; "jet" is the paper's look
DIFFERENCE_CMAP = "RdBu_r"  # diverging, told apart by colour-blind readers; white is no change
LEVELS = ("time", "head", "layer")
SCALES = ("shared", "each")
MEANING = {
    "r2g": "R2G: which regions of the generated image the reference influenced",
    "g2r": "G2R: which parts of the reference contributed",
    "mass": "Mass: share of attention spent on the reference",
}
LEVEL_NAMES = {"time": ("TLAM", "time groups"), "head": ("HLAM", "heads"), "layer": ("LLAM", "layers")}
PANEL_PIXELS = 320  # small multiples hold their image at this size: they are printed smaller than that
PANEL_INCHES = 1.38
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
) -> Axes:
    """Draws a map over the image that it is about, resized smoothly (bicubic) to the image.

    The photograph is shown in grey under the map, so that every hue is the map's.

    Args:
        image: PIL image; array ``[H, W]``, ``[H, W, 3]`` or a batch ``[B, H, W, 3]``; tensor ``[3, H, W]`` or
            ``[B, 3, H, W]``; or a list of images. Values 0…255 (uint8) or 0…1 (float).
        map: ``[h, w]``, or a batch ``[B, h, w]`` of them; any resolution.
        ax: where to draw; None makes a figure of its own (``ax.figure``).
        index: which one of a batch, of maps and of images alike.
        cmap: a matplotlib colour map.
        alpha: opacity of the map, 0…1.
        vmin, vmax: values of the colour map's ends. None: the map's own minimum and maximum.
        colorbar: whether to draw one.
        title: above the image.

    Raises:
        ValueError: not an image or a map of these shapes; the map is not finite (a time group without a step);
            ``vmin`` is not below ``vmax``.
        IndexError: ``index`` is outside the batch.
    """
    from matplotlib.figure import Figure

    picture, values = as_picture(image, index), _map(map, index)
    if not np.isfinite(values).all():
        raise ValueError("the map has values that are not finite (a time group in which no step ran is NaN)")
    if ax is None:
        height, width = picture.shape[:2]
        ax = Figure(figsize=(4.6, 4.0 * height / width + 0.3), layout="constrained").add_subplot()
    heat = _draw(ax, picture, values, cmap, alpha, *_limits([values], vmin, vmax))
    if colorbar:
        _colorbar(ax.figure, heat, [ax])
    if title:
        ax.set_title(_wrap(title, 42), fontsize=9)
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
    """All maps of one level, each over the image: a filmstrip of time groups, or a grid of heads or layers.

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
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    scale = scale or ("each" if level == "layer" else "shared")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    batch = {"time": maps.tlam, "head": maps.hlam, "layer": maps.llam}[level](direction, **options)
    panels = list(_one(batch, index, "maps").numpy())
    labels = _labels(maps, direction, level, options)
    name, what = LEVEL_NAMES[level]
    said = "one colour scale for all" if scale == "shared" else "each panel on its own colour scale: range below it"
    return _grid(
        as_picture(image, index),
        panels,
        labels,
        columns or _balanced(len(panels), MOST_COLUMNS[level]),
        shared=scale == "shared",
        cmap=cmap,
        alpha=alpha,
        title=f"{name} ({what}) · {MEANING[direction]}",
        footer="\n".join(filter(None, (_units(direction, options) + "; " + said, footer))),
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
    """Both directions in one figure: the generated image with ULAM R2G, the reference with ULAM G2R.

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
    from matplotlib.figure import Figure

    options["reference"] = reference_name
    rows = [("generated", "r2g", as_picture(generated, index)), ("reference", "g2r", as_picture(reference, index))]
    found = {"r2g": maps.ulam("r2g", **options), "g2r": _or_reason(maps, "g2r", options)}
    heights = [min(3.0 * picture.shape[0] / picture.shape[1], 4.0) for _, _, picture in rows]  # inches
    figure = Figure(figsize=(7.0, sum(heights) + 1.3), layout="constrained")
    axes = figure.subplots(2, 2, squeeze=False, height_ratios=heights)
    for (name, direction, picture), (plain, mapped) in zip(rows, axes, strict=True):
        _bare(plain).imshow(picture)
        plain.set_title(name, fontsize=9)
        if isinstance(found[direction], str):
            _instead(mapped, "no 2-D layout, no G2R map", found[direction])
            continue
        ulam = _one(found[direction], index, "maps")
        overlay(picture, ulam, mapped, cmap=cmap, alpha=alpha, title=MEANING[direction])
    figure.suptitle("ULAM: attribution over all time groups, heads and layers", fontsize=10)
    note(
        figure, "\n".join(filter(None, (_units("r2g", options) + "; each map from its minimum to its maximum", footer)))
    )
    return figure


def blend(image: Any, map: Tensor | np.ndarray, *, cmap: str = CMAP, alpha: float = 0.65) -> np.ndarray:
    """:func:`overlay` as pixels, without a figure: ``[H, W, 3]`` in 0…1, the map on its own scale."""
    from matplotlib import colormaps

    picture, values = as_picture(image, 0), _map(map, 0)
    low, high = _limits([values])
    heat = colormaps[cmap]((_resized(values, picture.shape[:2]) - low) / (high - low))[..., :3]
    return (1 - alpha) * _grey(picture) + alpha * heat.astype(np.float32)


def thumbnail(maps: AttributionMaps, *, cmap: str = CMAP) -> bytes:
    """PNG of the ULAMs alone, both directions, of the first image and reference: what a notebook shows of maps."""
    import io

    from matplotlib.figure import Figure

    options = {"reference": maps.references[0]}
    found = {d: _or_reason(maps, d, options) for d in ("r2g", "g2r")}
    panels = {d: x[0].numpy() for d, x in found.items() if not isinstance(x, str)}
    figure = Figure(figsize=(3.2 * len(panels), 2.9), layout="constrained")
    for ax, (direction, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        low, high = _limits([values])
        heat = _bare(ax).imshow(values, cmap=cmap, vmin=low, vmax=high, interpolation="bicubic")
        _colorbar(figure, heat, [ax])
        ax.set_title(_wrap(MEANING[direction], 40), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


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
    """Three panels: the patch marked on the generated image, its SRAM on the reference, and where most of it lies.

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
    from matplotlib.figure import Figure

    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    values = _map(maps.sram(region, canvas=canvas, **options), index)
    left, right = as_picture(generated, index), as_picture(reference, index)
    widths = [p.shape[1] / p.shape[0] for p in (left, right, right)]
    figure = Figure(figsize=(7.5, 7.0 / sum(widths) + 0.75), layout="constrained")
    marked, heated, outlined = figure.subplots(1, 3, width_ratios=widths)
    _bare(marked).imshow(left)
    _mark(marked, region, canvas or maps.canvas, left.shape[:2])
    marked.set_title("patch of the generated image", fontsize=8)
    heat = _draw(heated, right, values, cmap, alpha, *_limits([values]))
    _colorbar(figure, heat, [heated], shrink=0.75)
    heated.set_title("SRAM: the reference behind it", fontsize=8)
    _bare(outlined).imshow(right)
    smooth = _resized(values, right.shape[:2])
    for colour, width in (("black", 2.6), ("white", 1.2)):
        outlined.contour(smooth, levels=[holding(smooth, share)], colors=colour, linewidths=width)
    outlined.set_title(f"holds {round(100 * share)} % of it", fontsize=8)
    said = "the reference's share of the patch's attention; its own colour scale"
    return note(figure, "\n".join(filter(None, (said, footer))))


def holding(values: np.ndarray, share: float) -> float:
    """The highest level above which a map still holds ``share`` of its sum."""
    ranked = np.sort(values, axis=None)[::-1]
    total = ranked.cumsum()
    return float(ranked[min(int(np.searchsorted(total, share * total[-1])), len(ranked) - 1)])


def _mark(ax: Axes, region: Any, canvas: tuple[int, int], size: tuple[int, int]) -> None:
    """A ring around a point, an outline around a mask, a caption for a name."""
    if isinstance(region, str):
        ax.set_xlabel(f"registered: {region}", fontsize=7)
        return
    if isinstance(region, tuple) and len(region) == 2:
        y, x = (c * n / m - 0.5 for c, n, m in zip(region, size, canvas, strict=True))
        for colour, width in (("black", 3.2), ("white", 1.4)):
            ax.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)
        return
    mask = _map(torch.as_tensor(region).float(), 0)
    for colour, width in (("black", 2.6), ("white", 1.2)):
        ax.contour(_resized(mask, size), levels=[mask.max() / 2], colors=colour, linewidths=width)


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
    """Two runs' unified maps beside each other, and their difference.

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
    from matplotlib.figure import Figure

    if len(images) != 2 or len(names) != 2:
        raise ValueError(f"two images and two names are compared, got {len(images)} and {len(names)}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    values = [_map(maps.ulam(direction, **options), index) for maps in (first, second)]
    pictures = [as_picture(image, index) for image in images]
    widths = [p.shape[1] / p.shape[0] for p in (*pictures, pictures[0])]
    figure = Figure(figsize=(8.2, 7.2 / sum(widths) + 0.9), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=widths)
    for ax, picture, x, name in zip(axes, pictures, values, names, strict=False):
        heat = _draw(ax, picture, x, cmap, alpha, *_limits(values if scale == "shared" else [x]))
        ax.set_title(name, fontsize=9)
        if scale == "each" or name is names[1]:
            _colorbar(figure, heat, [ax] if scale == "each" else list(axes[:2]), shrink=0.75)
    difference(*values, axes[2], title=f"{names[1]} − {names[0]}")
    figure.suptitle(f"ULAM · {MEANING[direction]}", fontsize=9)
    said = "one colour scale for both" if scale == "shared" else "each on its own colour scale"
    return note(figure, "\n".join(filter(None, (_units(direction, options) + "; " + said, footer))))


def difference(
    before: Tensor | np.ndarray, after: Tensor | np.ndarray, ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """What changed between two maps, ``after − before``: red gained, blue lost, white did not change.

    Args:
        before, after: ``[h, w]`` of one grid and one unit.
        ax: where to draw; None makes a figure of its own.
        title: above it.

    Raises:
        ValueError: they are not finite, or not on one grid.
    """
    from matplotlib.figure import Figure

    a, b = _map(before, 0), _map(after, 0)
    if a.shape != b.shape:
        raise ValueError(f"maps on one grid can be subtracted, these are {a.shape} and {b.shape}: give both one size=")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the maps have values that are not finite (a time group in which no step ran is NaN)")
    if ax is None:
        ax = Figure(figsize=(4.0, 3.4), layout="constrained").add_subplot()
    most = float(np.abs(b - a).max()) or 1.0
    heat = _bare(ax).imshow(b - a, cmap=DIFFERENCE_CMAP, vmin=-most, vmax=most, interpolation="bicubic")
    _colorbar(ax.figure, heat, [ax])
    if title:
        ax.set_title(_wrap(title, 42), fontsize=9)
    return ax


def note(figure: Figure, text: str) -> Figure:
    """Writes a small note below a figure, wrapped to its width; replaces the one that is there."""
    figure.supxlabel(_wrap(text, int(figure.get_figwidth() * 18)), fontsize=6.5, color="0.25")
    return figure


# ---------------------------------------------------------------------------------------------------------- panels


def _grid(
    picture: np.ndarray,
    panels: Sequence[np.ndarray],
    labels: Sequence[str],
    columns: int,
    *,
    shared: bool,
    cmap: str,
    alpha: float,
    title: str,
    footer: str,
) -> Figure:
    """Panels ``[h, w]`` over one picture, with a label under each; a panel that is not finite says "no step"."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    lines = 1 + max(label.count("\n") for label in labels) + (not shared)
    panel_height = PANEL_INCHES * picture.shape[0] / picture.shape[1] + 0.12 * lines + 0.08
    width = max(PANEL_INCHES * columns + (0.8 if shared else 0.1), 4.2)
    title, footer = _wrap(title, int(width * 13)), _wrap(footer, int(width * 18))
    height = rows * panel_height + 0.17 * (title.count("\n") + 1) + 0.13 * (footer.count("\n") + 1) + 0.15
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)  # inches
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(panels) :]:
        ax.remove()

    picture = _shrunk(picture)
    finite = [panel for panel in panels if np.isfinite(panel).all()]
    common, heat = _limits(finite), None
    for ax, panel, label in zip(axes, panels, labels, strict=False):
        if np.isfinite(panel).all():
            limits = common if shared else _limits([panel])
            heat = _draw(ax, picture, panel, cmap, alpha, *limits)
            label += "" if shared else "\n" + _range(float(panel.min()), float(panel.max()))
        else:
            _bare(ax).imshow(0.75 + 0.25 * _grey(picture))
            ax.text(0.5, 0.5, "no step", transform=ax.transAxes, ha="center", va="center", fontsize=8)
        ax.set_xlabel(label, fontsize=6.5, labelpad=3)
    if shared and heat is not None:
        _colorbar(figure, heat, list(axes[: len(panels)]), shrink=0.8 if rows == 1 else 0.5)
    figure.suptitle(title, fontsize=9)
    note(figure, footer)
    return figure


def _balanced(count: int, most: int) -> int:
    """Columns for so many panels: ``most`` or a square of them, with rows about equally long (6: 3 + 3, not 5 + 1)."""
    most = max(most, math.isqrt(count - 1) + 1)
    return math.ceil(count / math.ceil(count / most))


def _draw(ax: Axes, picture: np.ndarray, values: np.ndarray, cmap: str, alpha: float, vmin: float, vmax: float):
    """The picture in grey under ``values [h, w]``; returns what a colour bar describes."""
    _bare(ax).imshow(_grey(picture))
    return ax.imshow(_resized(values, picture.shape[:2]), cmap=cmap, alpha=alpha, vmin=vmin, vmax=vmax)


def _colorbar(figure: Figure, heat, axes: list[Axes], shrink: float = 1.0) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    numbers = ScalarFormatter(useOffset=False, useMathText=True)
    numbers.set_powerlimits((-2, 3))
    bar = figure.colorbar(heat, ax=axes, shrink=shrink, fraction=0.05, pad=0.02, aspect=22, format=numbers)
    bar.solids.set_alpha(1)  # full colours are easier to read than those mixed with white
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.ax.yaxis.get_offset_text().set_fontsize(6.5)


def _instead(ax: Axes, headline: str, reason: str) -> None:
    """Text where a map would be."""
    _bare(ax).set_title(headline, fontsize=9)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color("0.8")
    ax.text(0.5, 0.5, _wrap(reason, 40), transform=ax.transAxes, ha="center", va="center", fontsize=7, color="0.25")


def _bare(ax: Axes) -> Axes:
    """No ticks and no frame; a label below stays possible."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


# ---------------------------------------------------------------------------------------------------------- labels


def _labels(maps: AttributionMaps, direction: str, level: str, options: dict) -> list[str]:
    """One label a panel, in the order of the level's maps."""
    if level == "time":
        return [_time_label(maps, t, options) for t in pick(options.get("times"), maps.time_groups, "times")]
    if level == "head":
        heads = maps.hlam(direction, **{**options, "heads": None}).shape[1]
        return [f"head {head}" for head in pick(options.get("heads"), heads, "heads")]
    grids = maps.grids(options.get("reference"))
    layers = options.get("layers")
    names = [n for n in maps.layers if n in grids] if layers is None else choose_layers(grids, layers)
    sizes = "" if direction == "g2r" else "\n{} × {} tokens"
    return [short + sizes.format(*grids[name]) for name, short in zip(names, short_layer_names(names), strict=True)]


def _time_label(maps: AttributionMaps, group: int, options: dict) -> str:
    """Which part of the run a time group covers, and how many of the model's calls fell into it."""
    counts = np.array(list(maps.counts(options.get("reference")).values())).max(0)  # a cache may skip some layers
    share = [round(100 * edge / maps.time_groups) for edge in (group, group + 1)]
    return f"group {group} · {share[0]}–{share[1]} % of run\n{counts[group]} of {counts.sum()} calls"


def short_layer_names(names: Sequence[str], width: int = 20) -> list[str]:
    """Names for under a panel: diffusers' block names abbreviated, anything longer wrapped at its dots.

    ``up_blocks.3.attentions.2.transformer_blocks.0.attn2`` becomes ``up 3 · attn 2``, with `` · block 0`` where a
    transformer of that model has several blocks.
    """
    parts = [_block_parts(name) for name in names]
    several = any(p is not None and p[-1] != "0" for p in parts)
    return [
        _wrap_dots(name, width) if p is None else f"{p[0]} · attn {p[1]}" + (f" · block {p[2]}" if several else "")
        for name, p in zip(names, parts, strict=True)
    ]


def _block_parts(name: str) -> tuple[str, str, str] | None:
    """(block, attention, transformer block) of a diffusers UNet layer name."""
    words = name.split(".")
    if words[-1:] != ["attn2"] or words[-3:-2] != ["transformer_blocks"] or words[-5:-4] != ["attentions"]:
        return None
    block = words[:-5]
    if not block or not block[0].endswith(("_blocks", "_block")):
        return None
    return " ".join([block[0].split("_")[0], *block[1:]]), words[-4], words[-2]


def _wrap_dots(name: str, width: int) -> str:
    """``name`` broken after dots into lines of about ``width``, of which the last three are kept."""
    lines = [""]
    for word in name.replace(".", ". ").split():
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] += word if len(word) <= width else word[: width - 1] + "…"
    return "\n".join(lines if len(lines) <= 3 else ["…" + lines[-3], *lines[-2:]])


def _range(low: float, high: float) -> str:
    """Both ends with three digits of the larger, over one power of ten: ``0.78 – 1.23 ×10⁻³``."""
    exponent = math.floor(math.log10(high)) if high > 0 else 0
    if -2 < exponent < 3:
        return f"{low:.3g} – {high:.3g}"
    return f"{low / 10**exponent:.2f} – {high / 10**exponent:.2f} $\\times10^{{{exponent}}}$"


def _units(direction: str, options: dict) -> str:
    if direction == "mass":
        return "0…1 of a token's attention"
    if options.get("normalize", "raw") == "lift":
        return "values × number of tokens (1 = uniform)"
    return "raw values (sum over a layer's tokens ≤ 1)"


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


# ---------------------------------------------------------------------------------------------------------- arrays


def _or_reason(maps: AttributionMaps, direction: str, options: dict) -> Tensor | str:
    """ULAM, or why there is none."""
    try:
        return maps.ulam(direction, **options)
    except ValueError as error:
        return str(error)


def _one(batch, index: int, what: str):
    if not -len(batch) <= index < len(batch):
        raise IndexError(f"index={index}, but there are {len(batch)} {what}")
    return batch[index]


def _map(map: Tensor | np.ndarray, index: int) -> np.ndarray:
    """``[h, w]`` float32 of a map or of one in a batch."""
    values = map.detach().cpu().float().numpy() if isinstance(map, Tensor) else np.asarray(map, dtype=np.float32)
    if values.ndim == 3:
        values = _one(values, index, "maps")
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map must be [h, w] or a batch [B, h, w], got shape {tuple(values.shape)}")
    return values


def as_picture(image: Any, index: int) -> np.ndarray:
    """``[H, W, 3]`` float in 0…1 of any of the forms that :func:`overlay` takes."""
    if isinstance(image, (list, tuple)):
        image = _one(image, index, "images")
    if hasattr(image, "convert"):  # PIL
        pixels = np.asarray(image.convert("RGB"))
    elif isinstance(image, Tensor):
        pixels = image.detach().cpu().movedim(-3, -1).numpy() if image.ndim > 2 else image.detach().cpu().numpy()
    else:
        pixels = np.asarray(image)
    if pixels.ndim == 4:
        pixels = _one(pixels, index, "images")
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


def _grey(picture: np.ndarray) -> np.ndarray:
    """Rec. 601 luma, as three equal channels."""
    return (picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None].repeat(3, axis=-1)


def _shrunk(picture: np.ndarray) -> np.ndarray:
    """At most PANEL_PIXELS on the longer side."""
    height, width = picture.shape[:2]
    longer = max(height, width)
    if longer <= PANEL_PIXELS:
        return picture
    size = [max(round(n * PANEL_PIXELS / longer), 1) for n in (height, width)]
    pixels = torch.from_numpy(picture).movedim(-1, 0)[None]
    return F.interpolate(pixels, size, mode="area")[0].movedim(0, -1).numpy()


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[h, w]`` → ``size``, bicubic as for the maps' common grid, never beyond the values there are."""
    grid = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    return F.interpolate(grid, size, mode="bicubic", align_corners=False)[0, 0].numpy().clip(values.min(), values.max())


def _limits(panels: Sequence[np.ndarray], vmin: float | None = None, vmax: float | None = None) -> tuple[float, float]:
    """Ends of a colour scale over some maps, never equal (a constant map is drawn in the lowest colour)."""
    if vmin is not None and vmax is not None and vmin >= vmax:
        raise ValueError(f"vmin must be below vmax, got {vmin} and {vmax}")
    low = min((float(p.min()) for p in panels), default=0.0) if vmin is None else vmin
    high = max((float(p.max()) for p in panels), default=1.0) if vmax is None else vmax
    return low, high if high > low else low + (abs(low) or 1.0)
