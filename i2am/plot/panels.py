"""Parts of figures: a map on its picture, a colour bar, a grid of them, a note."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from i2am.plot.arrays import grey, limits_of, resized, shrunk
from i2am.plot.labels import value_range, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CMAP = "inferno"  # perceptually even, told apart by colour-blind readers and in grey print; "jet" is the paper's look
SCALES = ("shared", "each")
PANEL_INCHES = 1.38


def grid(
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
    quantity: str | None = None,
) -> Figure:
    """Draw panels ``[h, w]`` over one picture, with a label under each; a panel that is not finite says "no step"."""
    from i2am.plot.shown import Figure

    rows = math.ceil(len(panels) / columns)
    lines = 1 + max(label.count("\n") for label in labels) + (not shared)
    panel_height = PANEL_INCHES * picture.shape[0] / picture.shape[1] + 0.12 * lines + 0.08
    width = max(PANEL_INCHES * columns + (0.8 if shared else 0.1), 4.2)
    title, footer = wrap(title, int(width * 13)), wrap(footer, int(width * 18))
    height = rows * panel_height + 0.17 * (title.count("\n") + 1) + 0.13 * (footer.count("\n") + 1) + 0.15
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)  # inches
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(panels) :]:
        ax.remove()

    picture = shrunk(picture)
    finite = [panel for panel in panels if np.isfinite(panel).all()]
    common, heat = limits_of(finite), None
    for ax, panel, label in zip(axes, panels, labels, strict=False):
        if np.isfinite(panel).all():
            limits = common if shared else limits_of([panel])
            heat = draw(ax, picture, panel, cmap, alpha, *limits)
            label += "" if shared else "\n" + value_range(float(panel.min()), float(panel.max()))
        else:
            bare(ax).imshow(0.75 + 0.25 * grey(picture))
            ax.text(0.5, 0.5, "no step", transform=ax.transAxes, ha="center", va="center", fontsize=8)
        ax.set_xlabel(label, fontsize=6.5, labelpad=3)
    if shared and heat is not None:
        colorbar_of(figure, heat, list(axes[: len(panels)]), shrink=0.8 if rows == 1 else 0.5, quantity=quantity)
    figure.suptitle(title, fontsize=9)
    note(figure, footer)
    return figure


def balanced(count: int, most: int) -> int:
    """Choose the columns for so many panels: ``most`` or a square of them, rows about equally long (6: 3 + 3)."""
    most = max(most, math.isqrt(count - 1) + 1)
    return math.ceil(count / math.ceil(count / most))


def draw(ax: Axes, picture: np.ndarray, values: np.ndarray, cmap: str, alpha: float, vmin: float, vmax: float):
    """Draw the picture in grey under ``values [h, w]``; return what a colour bar describes."""
    bare(ax).imshow(grey(picture))
    return ax.imshow(resized(values, picture.shape[:2]), cmap=cmap, alpha=alpha, vmin=vmin, vmax=vmax)


def colorbar_of(figure: Figure, heat, axes: list[Axes], shrink: float = 1.0, quantity: str | None = None) -> None:
    """Draw a colour bar beside some axes, with the name of what it measures."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    numbers = ScalarFormatter(useOffset=False, useMathText=True)
    numbers.set_powerlimits((-2, 3))
    bar = figure.colorbar(heat, ax=axes, shrink=shrink, fraction=0.05, pad=0.02, aspect=22, format=numbers)
    bar.solids.set_alpha(1)  # full colours are easier to read than those mixed with white
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    if quantity:
        bar.set_label(quantity, fontsize=6.5)
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.ax.yaxis.get_offset_text().set_fontsize(6.5)


def instead(ax: Axes, headline: str, reason: str) -> None:
    """Write text where a map would be."""
    bare(ax).set_title(headline, fontsize=9)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color("0.8")
    ax.text(0.5, 0.5, wrap(reason, 40), transform=ax.transAxes, ha="center", va="center", fontsize=7, color="0.25")


def bare(ax: Axes) -> Axes:
    """Take ticks and frame away; a label below stays possible."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def note(figure: Figure, text: str) -> Figure:
    """Write a small note below a figure, wrapped to its width; replaces the one that is there."""
    figure.supxlabel(wrap(text, int(figure.get_figwidth() * 18)), fontsize=6.5, color="0.25")
    return figure
