"""refinement-scratch.png: error, SRAM and IMACS along training, seed by seed and on average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.refinement.statistics import SCORES, Points, Room

SHOWN = ("error", "sram", "imacs r2g")
COLOURS = ("tab:gray", "tab:blue", "tab:orange", "tab:green")


def draw(room: Room, conditions: tuple[str, ...], file: Path) -> None:
    """Draw a panel per score: thin lines are seeds, the thick one is their mean where all were measured."""
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for condition, colour in zip(conditions, COLOURS, strict=False):
            runs = list(room.runs.get(condition, {}).values())
            for points in runs:
                axes.plot(*curve(points, key), color=colour, linewidth=0.7, alpha=0.5)
            steps, means = average(runs, key)
            axes.plot(steps, means, color=colour, linewidth=2.2, label=condition)
        axes.set(xlabel="steps", title=SCORES[key], xscale="log")
        if key != "imacs r2g":
            axes.set_yscale("log")
    axes.legend()
    FigureCanvasAgg(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def curve(points: Points, key: str) -> tuple[list[int], list[float]]:
    """Return steps, and a score's mean over tasks."""
    return [p["steps"] for p in points], [float(np.nanmean(np.array(p[key], dtype=float))) for p in points]


def average(runs: list[Points], key: str) -> tuple[list[int], list[float]]:
    """Return the steps that every run was measured after, and the mean of their means."""
    curves = [dict(zip(*curve(points, key), strict=True)) for points in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, [float(np.mean([c[n] for c in curves])) for n in steps]
