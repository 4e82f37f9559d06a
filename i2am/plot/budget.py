"""Words beside references: a budget of attention as areas over time, and where each word acted."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from i2am.maps import AttributionMaps
from i2am.maps.budget import REST, Budget
from i2am.plot.arrays import as_picture, shrunk
from i2am.plot.figures import blend
from i2am.plot.panels import note
from i2am.plot.shown import Figure, single_axes

COLOURS = ("#9a3412", "#1d4ed8", "#0f766e", "#b45309", "#7e22ce", "#be123c", "#4d7c0f", "#0369a1")
NEUTRAL = "#d4d4d4"  # of what was not told apart


def budget(shares: Budget, *, index: int = 0, layer: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw what the generated picture spends its attention on, as areas over the denoising steps.

    ::

        with i2am.trace(pipe, words=["sleeve"], text=True, itself=True, time_groups="steps") as tracer:
            ...
        i2am.plot.budget(tracer.maps().budget(mask))

    Args:
        shares: of :meth:`AttributionMaps.budget`.
        index: which image of a batch.
        layer: one of ``shares.layers``. None: the mean over them.
        ax: an Axes of your own figure.

    Raises:
        ValueError: there is no such layer, or nothing ran.
        IndexError: ``index`` is outside the batch.
    """
    values = shares.over_time()
    if layer is not None:
        if layer not in shares.layers:
            raise ValueError(f"no layer {layer!r}; there are: {', '.join(shares.layers)}")
        values = shares.shares[:, :, shares.layers.index(layer)]
    if not -len(values) <= index < len(values):
        raise IndexError(f"index={index}, but the budget holds {len(values)} images")
    own = values[index].numpy()  # [T, S]
    ran = np.flatnonzero(np.isfinite(own).all(-1))
    if not len(ran):
        raise ValueError("no step ran in any time group")
    ax = single_axes(6.4, 3.4) if ax is None else ax
    T = len(own)
    edges = np.concatenate([[t, t + 1] for t in ran]) / (1 if shares.one_group_a_step else T / 100)
    areas = ax.stackplot(edges, own[ran].repeat(2, axis=0).T, colors=_colours(shares.sources), linewidth=0)
    handles: list[Any] = list(areas)
    ax.legend(
        handles[::-1],
        [f"{name}  {100 * own[ran, i].mean():.0f} %" for i, name in enumerate(shares.sources)][::-1],
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
    )
    ax.set(
        xlim=(edges[0], edges[-1]),
        ylim=(0, 1),
        xlabel="denoising step" if shares.one_group_a_step else "% of the run",
        ylabel="share of attention",
    )
    ax.set_title("On what the picture spends its attention" + ("" if layer is None else f"\n{layer}"), fontsize=10)
    return ax


def words(maps: AttributionMaps, image: Any, *, index: int = 0, footer: str | None = None) -> MatplotlibFigure:
    """Draw where each word acted (R2G), and above what share of the attention it took.

    Args:
        maps: traced with ``words=``.
        image: the generated image. Forms: see :func:`i2am.plot.overlay`.
        index: which sample of a batch.
        footer: a note below.

    Raises:
        ValueError: no words were told apart.
    """
    if not maps.words:
        raise ValueError('no words were told apart: trace with words=["…"]')
    picture = shrunk(as_picture(image, index))
    wide = max(len(maps.words), 2)
    figure = Figure(figsize=(2.6 * wide, 2.6 * picture.shape[0] / picture.shape[1] + 0.7), layout="constrained")
    for ax, word in zip(figure.subplots(1, wide, squeeze=False)[0], [*maps.words, None], strict=False):
        ax.set_axis_off()
        if word is not None:
            ax.imshow(blend(picture, maps.ulam("r2g", reference=word)[index].numpy()))
            share = float(maps.ulam("mass", reference=word)[index].mean())
            ax.set_title(f"{word}\n{100 * share:.2g} % of the attention", fontsize=9)
    return note(figure, footer) if footer else figure


def _colours(sources: list[str]) -> list[str]:
    return [NEUTRAL if name == REST else COLOURS[i % len(COLOURS)] for i, name in enumerate(sources)]
