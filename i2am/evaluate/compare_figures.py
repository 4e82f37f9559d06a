"""A comparison written down: tables, and figures of what moved."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from i2am import plot
from i2am._files import write_atomically
from i2am.evaluate.compare import GROUPED, Comparison
from i2am.evaluate.scores import MEANING
from i2am.evaluate.thumbnails import SHARES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

MOVERS = 6


def write(comparison: Comparison, out: Path) -> None:
    """Write ``compare.json``, ``compare.csv`` (a row a sample), ``compare.png`` and ``movers.png``."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison.summary(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(out / "compare.json", lambda path: path.write_text(text, "utf-8", "backslashreplace"))
    write_atomically(out / "compare.csv", lambda path: _write_table(comparison, path))
    for name, draw in (("compare.png", overview), ("movers.png", movers)):
        figure = draw(comparison)
        write_atomically(out / name, lambda path, figure=figure: figure.savefig(path, format="png", dpi=150))


def _write_table(comparison: Comparison, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        names = [f"{name}_{run}" for name in MEANING for run in "ab"]
        writer = csv.DictWriter(file, ["id", *(f"moved_{d}" for d in SHARES), *names])
        writer.writeheader()
        for i in comparison.samples:
            row = {"id": i} | {f"moved_{d}": share for d, share in comparison.moved[i].items()}
            for which, run in zip("ab", (comparison.a, comparison.b), strict=True):
                row |= {f"{name}_{which}": value for name, value in run.scores[i].items()}
            writer.writerow(row)


def format_table(comparison: Comparison) -> str:
    """Return the comparison as a table for people."""
    lines = [f"{len(comparison.samples)} samples, A = {comparison.a.path}, B = {comparison.b.path}"]
    lines += [f"{k}: {pair[0]!r} → {pair[1]!r}" for k, pair in comparison.settings.items()]
    for name, s in comparison.scores.items():
        d = s["difference"]
        spread = "" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]"
        p = "" if s["p"] is None else f"  p = {s['p']:.2g}"
        title = MEANING[name][0]
        lines.append(f"{title:<14}{s['a']:8.3f} →{s['b']:8.3f}   {d['mean']:+.3f}{spread}{p}")
    for d, s in comparison.summary()["moved"].items():
        lines.append(f"{d.upper()}: {100 * s['mean']:.1f} % of the attention moved")
        for level in GROUPED:
            table = comparison.where.get(f"{d}.{level}")
            if table and len(table) > 1:
                most = max(table, key=table.__getitem__)
                lines.append(f"    most in {most if level != 'llam' else f'layer {most}'}: {100 * table[most]:.1f} %")
    return "\n".join([*lines, *(f"note: {n}" for n in comparison.notes)])


def overview(comparison: Comparison) -> Figure:
    """Draw scores before and after, and where attention moved: by time group, head and layer."""
    from matplotlib.figure import Figure

    tables = {name: t for name, t in comparison.where.items() if len(t) > 1}
    levels = [level for level in GROUPED if any(name.endswith(level) for name in tables)]
    rows = (1 if comparison.scores else 0) + len(levels)
    longest = {level: max((len(t) for n, t in tables.items() if n.endswith(level)), default=1) for level in levels}
    heights = ([2.2] if comparison.scores else []) + [0.7 + 0.19 * longest[level] for level in levels]
    figure = Figure(figsize=(7.5, sum(heights) + 0.9), layout="constrained")
    grid = figure.add_gridspec(max(rows, 1), 2, height_ratios=heights or [1])
    if comparison.scores:
        _draw_scores(figure, grid[0, :], comparison)
    for row, level in enumerate(levels, rows - len(levels)):
        for column, direction in enumerate(comparison.directions):
            table = tables.get(f"{direction}.{level}")
            if table:
                _draw_where(figure.add_subplot(grid[row, column]), table, direction, level)
    figure.suptitle(f"B − A over {len(comparison.samples)} samples", fontsize=10)
    return plot.note(
        figure, f"A = {comparison.a.path}, B = {comparison.b.path}. Bars: mean share of a map's attention that moved"
    )


def _draw_scores(figure: Figure, place: SubplotSpec, comparison: Comparison) -> None:
    """Draw every sample's change as a line from A to B, the means in front."""
    axes = figure.add_subfigure(place).subplots(1, len(comparison.scores), squeeze=False)[0]
    for ax, (name, s) in zip(axes, comparison.scores.items(), strict=True):
        for i in comparison.samples:
            pair = [run.scores[i].get(name) for run in (comparison.a, comparison.b)]
            if None not in pair:
                ax.plot([0, 1], pair, color="0.75", linewidth=0.8)
        ax.plot([0, 1], [s["a"], s["b"]], color="#9a3412", linewidth=2.2, marker="o", markersize=4)
        ax.set_xticks([0, 1], ["A", "B"])
        ax.set_xlim(-0.25, 1.25)
        ax.set_title(f"{MEANING[name][0]}: {plot.signed(s['difference']['mean'], '+.3f')}", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)


def _draw_where(ax: Axes, table: dict[str, float], direction: str, level: str) -> None:
    names = plot.short_layer_names(list(table)) if level == "llam" else list(table)
    names = [n.replace("\n", "") for n in names]
    ax.barh(range(len(table)), [100 * v for v in table.values()], color="#31688e", height=0.7)
    ax.set_yticks(range(len(table)), names, fontsize=6.5)
    ax.invert_yaxis()
    ax.set_title(f"{direction.upper()} moved, by {GROUPED[level]} (%)", fontsize=8)
    ax.tick_params(axis="x", labelsize=6.5)
    ax.spines[["top", "right"]].set_visible(False)


def movers(comparison: Comparison) -> Figure:
    """Draw the samples that moved most: A, B, and the difference of their maps."""
    from matplotlib.figure import Figure

    chosen = comparison.movers[:MOVERS]
    directions = comparison.directions
    figure = Figure(figsize=(8.5, 2.6 * len(chosen) + 0.8), layout="constrained")
    grid = figure.add_gridspec(2 * len(chosen), 1 + len(directions), width_ratios=[3.2, *[1.0] * len(directions)])
    for row, i in enumerate(chosen):
        for half, (which, run) in enumerate((("A", comparison.a), ("B", comparison.b))):
            ax = figure.add_subplot(grid[2 * row + half, 0])
            ax.imshow(run.preview(i))
            ax.set_axis_off()
            shares = [f"{d.upper()} {100 * share:.3g} %" for d, share in comparison.moved[i].items()]
            ax.set_title(f"{which} · {i}" + ("" if half else "   moved: " + ", ".join(shares)), fontsize=7, loc="left")
        (x, _), (y, _) = (run.levels(i) for run in (comparison.a, comparison.b))
        for column, d in enumerate(directions):
            if f"{d}.ulam" in x and f"{d}.ulam" in y:
                ax = figure.add_subplot(grid[2 * row : 2 * row + 2, 1 + column])
                _draw_difference(figure, ax, x[f"{d}.ulam"], y[f"{d}.ulam"], d)
    figure.suptitle("Samples that moved most", fontsize=10)
    return plot.note(
        figure,
        "strips: generated, R2G on it, reference, G2R on it. Differences B − A of maps scaled to a mean of 1: red "
        "gained, blue lost; each on its own symmetric scale. Percentages: share of the attention that moved",
    )


def _draw_difference(figure: Figure, ax: Axes, a: Tensor, b: Tensor, direction: str) -> None:
    if a.shape != b.shape:
        b = F.interpolate(b[None], a.shape[-2:], mode="bilinear", align_corners=False)[0]
    plot.difference(a[0], b[0], ax)
    ax.set_title(f"{direction.upper()} difference", fontsize=7)
