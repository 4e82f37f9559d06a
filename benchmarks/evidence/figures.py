"""The figures of ``docs/evidence.md``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.localise import INPAINTING, r2g_maps
from benchmarks.evidence.subject import Setting, finest, paint, patch_pixels, tasks, traced, true_places
from i2am.detect import box_of, detect_box
from i2am.plot.labels import short_layer_names
from i2am.zoo import data


def samples(setting: Setting, images: Path, names: Iterable[str]) -> None:
    """zoo-NAME.png: reference, what there is without it, picture, truth, picture with a swapped reference."""
    for name in names:
        pipe, sample = setting.load(name), next(tasks(name, setting))
        size = sample.picture.shape[-2:]
        columns = {"reference": F.interpolate(sample.reference, size, mode="nearest")}
        if name == "superres":
            columns["bicubic"] = F.interpolate(sample.reference, size, mode="bicubic")
        else:
            columns["scene"] = sample.scene
        columns["generated"] = paint(pipe, sample, setting.steps)
        columns["truth"] = sample.picture
        columns["other reference"] = paint(pipe, sample, setting.steps, sample.reference.roll(1, 0))
        half = min(len(sample.picture), 12) // 2
        figure = Figure(figsize=(12, 1.2 * half + 0.3), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01)
        for row, line in enumerate(np.reshape(figure.subplots(half, 10), (half, 2, 5))):
            for axes, i in zip(line, (row, row + half), strict=True):
                for ax, (title, pictures) in zip(axes, columns.items(), strict=True):
                    ax.imshow(_image(pictures[i]), interpolation="nearest")
                    ax.axis("off")
                    _title(ax, title)
        _save(figure, images / f"zoo-{name}.png")


def localisation(setting: Setting, images: Path) -> None:
    """evidence-localisation.png: maps that compete, with found (dashed) and true boxes; square roots."""
    rows = []
    for name in INPAINTING:
        sample = next(tasks(name, setting))
        pictures, maps = traced(setting.load(name), sample, setting.steps)
        rows += [(sample, pictures, r2g_maps(maps), i) for i in (0, 5)]
    names = [n for n in rows[0][2] if "every key" not in n and "lift" not in n]
    figure = Figure(figsize=(2.1 * (len(names) + 2), 2.25 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names) + 2)
    for line, (sample, pictures, maps, i) in zip(axes, rows, strict=True):
        for ax, x, title in ((line[0], sample.reference, "reference"), (line[1], pictures, "generated")):
            ax.imshow(_image(x[i]))
            _title(ax, title)
        truth = box_of(sample.object[i, 0])
        for ax, name in zip(line[2:], names, strict=True):
            map = F.interpolate(maps[name][i : i + 1, None], sample.object.shape[-2:], mode="bicubic")[0, 0]
            ax.imshow(map.clamp_min(0).sqrt(), cmap="magma")  # R2G's peaks would hide the rest
            _box(ax, truth, "-", "white")
            found = detect_box(maps[name][i], size=tuple(map.shape))
            if found is not None:
                _box(ax, found, "--", "cyan")
            _title(ax, name.replace(", ", ",\n").replace(" (", "\n("))
        for ax in line:
            ax.set(xticks=[], yticks=[])
    _save(figure, images / "evidence-localisation.png")


def correspondence(setting: Setting, images: Path) -> None:
    """evidence-sram.png: every place of the reference has a colour; which colour went where, found and true."""
    lines = []
    for name in INPAINTING:
        sample = next(tasks(name, setting))
        pipe = setting.load(name)
        pictures, maps = traced(pipe, sample, setting.steps, record="qk")
        found = maps.match(layers=finest(maps)).best * patch_pixels(pipe, sample) / data.SIZE
        lines += [(sample, pictures, found, i) for i in (0, 5)]
    figure = Figure(figsize=(10.5, 2.2 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), 5)
    titles = ("reference", "generated", "colour of each place", "true source", "SRAM's best patch")
    for line, (sample, pictures, best, i) in zip(axes, lines, strict=True):
        truth = true_places(sample, tuple(best.shape[1:3]))[i] / data.SIZE
        known = ~truth.isnan().any(-1, keepdim=True)
        steps = (torch.arange(data.SIZE) + 0.5) / data.SIZE
        wheel = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        found = torch.where(known, best[i], torch.nan)
        shown = (_image(sample.reference[i]), _image(pictures[i]), _colours(wheel), _colours(truth), _colours(found))
        for ax, x, title in zip(line, shown, titles, strict=True):
            ax.imshow(x)
            ax.set(xticks=[], yticks=[])
            _title(ax, title)
    _save(figure, images / "evidence-sram.png")


def imacs(found: dict, images: Path) -> None:
    """evidence-imacs.png: IMACS and error along training."""
    if not found["runs"]:
        return
    keys = ("IMACS of R2G", "IMACS of G2R", "inside / outside of R2G, finest")
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(keys))
    for run, part in found["runs"].items():
        points = part["points"]
        for ax, key in zip(axes, keys, strict=True):
            rho = part["rho"][key]["error"][0]
            ax.plot([p[key] for p in points], [p["error"] for p in points], "o-", ms=4, label=f"{run}: ρ = {rho:.2f}")
            ax.set(xlabel=key, ylabel="error on the object", yscale="log")
            ax.legend(frameon=False)
    _save(figure, images / "evidence-imacs.png")


def levels(found: dict, images: Path) -> None:
    """evidence-layers.png: what a layer's R2G scores, and what its loss costs."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (name, part) in zip(axes, found.items(), strict=True):
        whole = part["muting"]["nothing"]["error"][0]
        layers = [x for x in part["levels"] if not x.startswith("time")]
        at = np.arange(len(layers))
        scores = [part["levels"][x]["contrast"][0] for x in layers]
        costs = [part["layers"][x] / whole for x in layers]
        ax.barh(at - 0.2, scores, 0.38, label="R2G inside / outside")
        ax.barh(at + 0.2, costs, 0.38, label="error when muted, times the whole model's")
        ax.axvline(1, color="grey", lw=0.8)
        ax.set(yticks=at, yticklabels=short_layer_names(layers), title=name)
    axes[0].invert_yaxis()  # both: they share it
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, images / "evidence-layers.png")


def faithfulness(found: dict, images: Path) -> None:
    """evidence-faithfulness.png: change of the output as cells go, in each order."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(found["tests"]))
    colours: dict[str, str] = {}
    for ax, (test, rows) in zip(axes, found["tests"].items(), strict=True):
        for row, x in rows.items():
            style = "--" if row in ("random", "opposite of ULAM") else "-"
            mean, low, high = np.array(x["curve"]).T
            colour = colours.setdefault(row, f"C{len(colours)}")
            ax.plot(found["shares"], mean, style, color=colour, label=row)
            ax.fill_between(found["shares"], low, high, color=colour, alpha=0.12, lw=0)
        ax.set(xlabel="share of cells", ylabel="change, of the complete one", title=test)
        ax.legend(frameon=False, fontsize=7)
    _save(figure, images / "evidence-faithfulness.png")


# ------------------------------------------------------------------------------------------------------------ helpers


def _image(x: Tensor) -> np.ndarray:
    return ((x.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()


def _colours(places: Tensor) -> np.ndarray:
    """``[h, w, 2]`` in [0, 1] → colours; unknown ones are white."""
    known = ~places.isnan().any(-1, keepdim=True)
    y, x = places.nan_to_num(0).split(1, -1)
    return torch.where(known, torch.cat([y, x, 1 - (x + y) / 2], -1), 1.0).clamp(0, 1).numpy()


def _box(ax, box, style: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (box.left - 0.5, box.top - 0.5)
    size = (box.right - box.left, box.bottom - box.top)
    ax.add_patch(Rectangle(corner, *size, fill=False, ls=style, lw=1.3, ec=colour))


def _title(ax, text: str) -> None:
    if ax.get_subplotspec().is_first_row():
        ax.set_title(text, fontsize=8)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=110)
