"""Two runs over the same samples: what moved, where, and by how much.

A run is a folder of ``i2am evaluate`` (many samples) or of ``i2am trace`` (one). Maps are compared as distributions:
the total variation distance ``½ Σ |a − b|`` of two maps that each sum to 1 lies in [0, 1]: the share of attention that
moved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from i2am import plot
from i2am.evaluate.scores import MEANING
from i2am.evaluate.sheet import preview
from i2am.evaluate.store import SETTINGS, Store
from i2am.evaluate.summary import METHOD, interval
from i2am.evaluate.thumbnails import SHARES, as_distribution, read_levels, small_levels
from i2am.maps import AttributionMaps
from i2am.maps.names import LEVELS

if TYPE_CHECKING:
    from PIL.Image import Image

UNCOMPARED = ("versions", "files", "weights")
GROUPED = {name: level.one for name, level in LEVELS.items() if level.axis is not None}  # "tlam": "time group"


@dataclass
class Run:
    """One folder: its settings, and what it knows of each sample."""

    path: Path
    settings: dict[str, Any]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # id → name → value
    seeds: dict[str, int] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)  # id → digest of the manifest's row

    def levels(self, sample: str) -> tuple[dict[str, Tensor], list[str]]:
        """Read maps at every level, and the layers' names; see :func:`i2am.evaluate.thumbnails.read_levels`."""
        if self.settings["command"] == "evaluate":
            return read_levels(Store(self.path).path("levels", sample, ".safetensors"))
        maps = AttributionMaps.load(self.path / "maps.safetensors")
        return small_levels(maps), maps.layers

    def preview(self, sample: str) -> Image:
        """Return the sample's strip of images."""
        from PIL import Image

        if self.settings["command"] == "evaluate":
            return Image.open(Store(self.path).path("previews", sample, ".jpg"))
        maps = AttributionMaps.load(self.path / "maps.safetensors")
        images = [Image.open(self.path / f"{name}.png") for name in ("generated", "reference")]
        has_g2r = "g2r.ulam" in small_levels(maps)
        return preview(images[0], maps.ulam("r2g")[0], images[1], maps.ulam("g2r")[0] if has_g2r else None, None)


@dataclass
class Comparison:
    """Result of :func:`compare`."""

    a: Run
    b: Run
    samples: list[str]
    scores: dict[str, dict[str, Any]]  # name → both means, their difference B − A with its interval, a p-value
    moved: dict[str, dict[str, float]]  # id → direction → share of attention that moved
    where: dict[str, dict[str, list[float]]]  # "r2g.tlam" → label → mean share that moved
    settings: dict[str, tuple[Any, Any]]  # those that differ
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "a": str(self.a.path),
            "b": str(self.b.path),
            "samples": len(self.samples),
            "method": METHOD.replace("mean over", "mean of B − A over") + "; p: Wilcoxon signed-rank, two-sided",
            "settings": self.settings,
            "scores": self.scores,
            "moved": {d: interval([m[d] for m in self.moved.values() if d in m]) for d in self.directions},
            "where": self.where,
            "notes": self.notes,
        }

    @property
    def directions(self) -> list[str]:
        return [d for d in SHARES if any(d in moved for moved in self.moved.values())]

    @property
    def movers(self) -> list[str]:
        """Samples, those that moved most first."""
        return sorted(self.moved, key=lambda i: -max(self.moved[i].values()))


def compare(a: Path, b: Path) -> Comparison:
    """Compare two runs, sample by sample.

    Args:
        a, b: folders of ``i2am evaluate``, or both of ``i2am trace``.

    Raises:
        ValueError: a folder is neither; they have no finished sample in common.
    """
    runs = read_run(a), read_run(b)
    samples = [i for i in runs[0].scores if i in runs[1].scores]
    if not samples:
        raise ValueError(f"{a} and {b} have no finished sample in common")
    moved, where, left_out = {}, {}, {}
    for sample in samples:
        (x, layers), (y, other) = (run.levels(sample) for run in runs)
        shares, labels = moved_shares(x, y, layers, other), _labels(x, layers, other)
        moved[sample] = {d: shares[f"{d}.ulam"][0] for d in SHARES if f"{d}.ulam" in shares}
        left_out |= _left_out(x, y, layers, other, shares)
        for name in shares.keys() & labels.keys():
            table = where.setdefault(name, {})
            for label, share in zip(labels[name], shares[name], strict=True):
                if math.isfinite(share):
                    table.setdefault(label, []).append(share)
    means = {name: {label: float(np.mean(s)) for label, s in table.items()} for name, table in sorted(where.items())}
    keys = sorted({*runs[0].settings, *runs[1].settings} - {*UNCOMPARED})
    differing = {k: (runs[0].settings.get(k), runs[1].settings.get(k)) for k in keys}
    differing = {k: pair for k, pair in differing.items() if pair[0] != pair[1]} | _weights(runs)
    notes = [*_notes(runs, samples), *left_out]
    return Comparison(*runs, samples, _scores(runs, samples), moved, means, differing, notes)


def read_run(path: Path) -> Run:
    """Read a folder's settings and scores.

    Raises:
        ValueError: i2am wrote no run there.
    """
    path = Path(path)
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        command = settings["command"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no folder of `i2am evaluate` or `i2am trace`: {error}") from error
    run = Run(path, settings)
    if command == "evaluate":
        for record in Store(path).all_records():
            if record["status"] == "ok":
                run.scores[record["id"]] = {name: record[name] for name in MEANING if name in record}
                run.seeds[record["id"]], run.rows[record["id"]] = record["seed"], record["digest"]
    elif (path / "maps.safetensors").exists():
        run.settings["command"] = "trace"
        run.scores["run"], run.seeds["run"] = {}, settings.get("seed", 0)
    return run


def moved_shares(
    x: dict[str, Tensor], y: dict[str, Tensor], layers: Sequence[str], others: Sequence[str]
) -> dict[str, list[float]]:
    """Return shares of attention that moved, one a map: ``{"r2g.llam": [...]}``.

    Layers are matched by name; other levels by number, and left out where the numbers differ. Maps on other grids are
    resized to the first one's.
    """
    found = {}
    for name in x.keys() & y.keys():
        p, q = x[name], y[name]
        if name.endswith("llam"):
            common = [n for n in layers if n in others]
            p, q = p[[layers.index(n) for n in common]], q[[others.index(n) for n in common]]
        if len(p) == len(q) and len(p):
            found[name] = total_variation(p, q).tolist()
    return found


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return ``½ Σ |p − q|`` of maps ``[..., h, w]``, each scaled to sum 1: in [0, 1]; NaN if one is not finite."""
    if p.shape[-2:] != q.shape[-2:]:
        grids = q.nan_to_num(0.0).reshape(1, -1, *q.shape[-2:])
        grids = F.interpolate(grids, p.shape[-2:], mode="bilinear", align_corners=False)
        q = grids.reshape(*q.shape[:-2], *p.shape[-2:])
    return (as_distribution(p) - as_distribution(q)).abs().sum((-2, -1)) / 2


def _labels(x: dict[str, Tensor], layers: Sequence[str], others: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the maps of each level."""
    named = {"llam": [n for n in layers if n in others]}
    return {
        f"{d}.{level}": named.get(level) or [f"{what} {i}" for i in range(len(x[f"{d}.{level}"]))]
        for d in SHARES
        for level, what in GROUPED.items()
        if f"{d}.{level}" in x
    }


def _left_out(
    x: dict[str, Tensor], y: dict[str, Tensor], layers: Sequence[str], others: Sequence[str], shares: dict
) -> dict[str, None]:
    """Return sentences (in order, each once) about what one run has and the other does not."""
    sentences = []
    alone = [
        plot.short_layer_names([n])[0].replace("\n", "")
        for n in [*layers, *others]
        if n not in layers or n not in others
    ]
    if alone:
        sentences.append(f"layers in one run only are left out: {', '.join(alone)}")
    for level, what in GROUPED.items():
        name = f"r2g.{level}"
        if name in x and name in y and name not in shares:
            sentences.append(f"the runs have {len(x[name])} and {len(y[name])} {what}s: {what}s are not compared")
        elif name in shares:
            empty = [str(i) for i, share in enumerate(shares[name]) if not math.isfinite(share)]
            if empty:
                sentences.append(f"{what}s in which no step ran, in one run or both, are left out: {', '.join(empty)}")
        elif name in x or name in y:
            sentences.append(f"one run has no maps by {what}: {what}s are not compared")
    return dict.fromkeys(sentences)


def _weights(runs: tuple[Run, Run]) -> dict[str, tuple[str, str]]:
    """Return a short digest of both runs' weights, where both say and they differ."""
    known = [run.settings.get("weights") for run in runs]
    if None in known or known[0] == known[1]:
        return {}
    a, b = (hashlib.sha256(json.dumps(w, sort_keys=True).encode()).hexdigest()[:8] for w in known)
    return {"weights": (a, b)}


def _scores(runs: tuple[Run, Run], samples: list[str]) -> dict[str, dict[str, Any]]:
    from scipy.stats import wilcoxon

    found = {}
    for name in MEANING:
        pairs = [
            (runs[0].scores[i][name], runs[1].scores[i][name])
            for i in samples
            if name in runs[0].scores[i] and name in runs[1].scores[i]
        ]
        if not pairs:
            continue
        a, b = np.array(pairs).T
        p = None if len(pairs) < 2 or not (b != a).any() else float(wilcoxon(b, a).pvalue)
        found[name] = {
            "a": float(a.mean()),
            "b": float(b.mean()),
            "difference": interval(b - a),
            "better": int((b > a).sum()),
            "worse": int((b < a).sum()),
            "p": p,
        }
    return found


def _notes(runs: tuple[Run, Run], samples: list[str]) -> list[str]:
    notes = []
    for run, other in (runs, runs[::-1]):
        if missing := [i for i in other.scores if i not in run.scores]:
            notes.append(f"{len(missing)} samples are not finished in {run.path}, and left out")
    if any(runs[0].seeds[i] != runs[1].seeds[i] for i in samples):
        notes.append("some samples have other seeds: part of what moved is the noise's doing")
    elif changed := [i for i in samples if runs[0].rows.get(i) != runs[1].rows.get(i)]:
        notes.append(
            f"the manifests' rows differ, and with them inputs, for {', '.join(changed[:5])}" + "…" * (len(changed) > 5)
        )
    return notes
