"""What stored runs say: means over tasks and seeds, and differences between runs that saw the same tasks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.evidence.subject import interval

Interval = list[float]  # mean, low, high
Points = list[dict]  # of one run, by steps
SCORES = {
    "error": "error on the object",
    "sram": "SRAM off (px)",
    "place": "expected place off (px)",
    "imacs r2g": "IMACS of R2G",
    "imacs g2r": "IMACS of G2R",
}


class Room:
    """The runs of one plan: ``[condition][seed]`` → their points."""

    def __init__(self, folder: Path, conditions: dict[str, str]):
        self.runs: dict[str, dict[int, Points]] = {}
        for condition, stem in conditions.items():
            for file in sorted(folder.glob(f"{stem}-*.json")):
                seed = file.stem.removeprefix(f"{stem}-")
                if seed.isdecimal():
                    points = json.loads(file.read_text(encoding="utf-8"))
                    self.runs.setdefault(condition, {})[int(seed)] = points

    def seeds(self, condition: str, steps: int, samples: int = 1) -> list[int]:
        """Return the seeds that were measured after ``steps``, on at least ``samples`` tasks."""
        runs = self.runs.get(condition, {})
        return [seed for seed, p in runs.items() if any(x["steps"] == steps and len(x["error"]) >= samples for x in p)]

    def at(self, condition: str, seed: int, steps: int) -> dict:
        return next(p for p in self.runs[condition][seed] if p["steps"] == steps)

    def tasks(self, condition: str, seeds: list[int], steps: int, key: str) -> np.ndarray:
        """Return a score of each task, averaged over seeds."""
        each = [np.array(self.at(condition, seed, steps)[key], dtype=float) for seed in seeds]
        n = min(len(x) for x in each)
        return np.mean([x[:n] for x in each], axis=0)

    def score(self, condition: str, seeds: list[int], steps: int, key: str) -> Interval:
        return interval(self.tasks(condition, seeds, steps, key))

    def change(self, condition: str, seeds: list[int], steps: int, key: str = "error", base: str = "plain") -> Interval:
        """Return the change against another condition in per cent of it, of the same tasks, seeds and steps."""
        ours, theirs = (self.tasks(c, seeds, steps, key) for c in (condition, base))
        return relative(ours, theirs)

    def price(self, condition: str, seeds: list[int], steps: int) -> float:
        """Return the median over seeds of a step's CPU time, in that of a plain step."""
        ratios = [self.at(condition, s, steps)["cpu"] / self.at("plain", s, steps)["cpu"] for s in seeds]
        return float(np.median(ratios))

    def equal_time(self, condition: str, seeds: list[int], steps: int) -> tuple[float, Interval] | None:
        """Return the steps that a condition makes while plain makes ``steps``, and the error's change then.

        The error is interpolated between the measurements around it, in the logarithm of steps, task by task.
        """
        reached = steps / self.price(condition, seeds, steps)
        ours, theirs = [], []
        for seed in seeds:
            points = self.runs[condition][seed]
            before = [p for p in points if p["steps"] <= reached]
            after = [p for p in points if p["steps"] >= reached]
            if not before or not after:
                return None
            a, b = before[-1], after[0]
            n = min(len(a["error"]), len(b["error"]))
            span = np.log(b["steps"]) - np.log(a["steps"])
            share = (np.log(reached) - np.log(a["steps"])) / span if span else 0.0
            x, y = (np.array(p["error"][:n]) for p in (a, b))
            ours.append(x + share * (y - x))
            theirs.append(np.array(self.at("plain", seed, steps)["error"]))
        n = min(map(len, ours + theirs))
        return reached, relative(np.mean([x[:n] for x in ours], 0), np.mean([x[:n] for x in theirs], 0))


def relative(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """Return the change of the mean in per cent, ``[value, low, high]``: 95 % of 2,000 bootstrap draws of the pairs."""
    known = np.isfinite(ours) & np.isfinite(theirs)
    ours, theirs = ours[known], theirs[known]
    picks = np.random.default_rng(0).integers(ours.size, size=(2000, ours.size))
    drawn = 100 * (ours[picks].mean(1) / theirs[picks].mean(1) - 1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [float(100 * (ours.mean() / theirs.mean() - 1)), float(low), float(high)]
