"""What the maps of a tracer are a mean of: counted while it traces, told with every map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from i2am.maps.aggregate import LayerSums
from i2am.references import Grid
from i2am.tracing.sums import Place
from i2am.versions import versions


class Ledger:
    """Counts of what a tracer has seen, and how each decision was made.

    Args:
        model: class name of the traced model.
        pipeline: class name of the pipeline; None: a bare model.
    """

    def __init__(self, model: str, pipeline: str | None = None):
        self.model = model
        self.pipeline = pipeline
        self.seen = 0
        self.counted = 0
        self.runs = 0
        self.steps: int | None = None  # of the last run
        self._at: int | None = None  # steps of the last run that have begun
        self._ended: Counter[tuple[int, int]] = Counter()  # (begun, in all) steps → runs before the last one
        self.passed_by: Counter[str] = Counter()
        self.guidance: dict[str, int] = {}  # how the conditional samples are known → calls
        self.tiles: set[Place] = set()
        self.processes: dict[str, int] | None = None  # among which each call was shared out
        self.notes: dict[str, None] = {}

    def run(self, step: int | None, steps: int | None, *, first: bool) -> None:
        """Note which step of how many is evaluated, and whether a run begins with it."""
        if first or self.runs == 0:
            self._ended.update(self._last())
            self.runs += 1
        self._at, self.steps = None if step is None else step + 1, steps

    def pass_by(self, why: str) -> None:
        """Note a call that does not count."""
        self.seen += 1
        self.passed_by[why] += 1

    def count(self, how: str, place: Place) -> None:
        """Note a call that counts."""
        self.seen += 1
        self.counted += 1
        self.guidance[how] = self.guidance.get(how, 0) + 1
        if place is not None:
            self.tiles.add(place)

    def note(self, text: str) -> None:
        """Keep a sentence that a reader of the maps should know."""
        self.notes[text] = None

    def told(self, tracks: Iterable[LayerSums], tokens: dict[str, str], canvas: Grid | None) -> dict[str, Any]:
        """Return the provenance of maps: plain values, as they are saved.

        Args:
            tracks: what was summed.
            tokens: reference → which of the keys it is.
            canvas: of tiles, in latent pixels.
        """
        calls: dict[str, list[int]] = {}
        for track in tracks:
            before = calls.get(track.layer, [0] * len(track.counts))
            calls[track.layer] = [max(a, b) for a, b in zip(before, track.counts, strict=True)]
        uneven = [layer for layer, counts in calls.items() if counts != max(calls.values())]
        notes = list(self.notes)
        if uneven:
            notes.append(
                f"{len(uneven)} of {len(calls)} layers ran in fewer calls than the others (a cache, a cut-off or a "
                "scale of "
                f"0), among them {uneven[0]}: each layer's mean is over its own calls"
            )
        notes += self._ended_early()
        empty = [g + 1 for g, ran in enumerate(zip(*calls.values(), strict=True)) if not any(ran)]
        if empty:
            notes.append(
                f"no layer ran in time group {', '.join(map(str, empty))} of {len(next(iter(calls.values())))} (a run "
                "that was interrupted, a cut-off, a scale of 0, a cache): there, maps by time are NaN; the others are "
                "means of the rest"
            )
        return {
            "summary": self._summary(notes),
            "model": self.model,
            "pipeline": self.pipeline,
            "runs": self.runs,
            "steps": self.steps,
            "calls": {"seen": self.seen, "counted": self.counted, "passed_by": dict(self.passed_by)},
            "guidance": dict(self.guidance),
            "layers": calls,
            "references": dict(tokens),
            "tiles": sorted([list(place) for place in self.tiles if place is not None]),
            "canvas": None if canvas is None else list(canvas),
            "processes": self.processes,
            "notes": notes,
            "versions": versions(),
        }

    def _last(self) -> list[tuple[int, int]]:
        """Return (begun, in all) steps of the last run; nothing where they are not known."""
        return [] if self._at is None or self.steps is None else [(self._at, self.steps)]

    def _lengths(self) -> Counter[tuple[int, int]]:
        """Return (begun, in all) steps → runs, the last one among them."""
        return self._ended + Counter(self._last())

    def _ended_early(self) -> list[str]:
        """Return a note if runs did not go through all of their steps."""
        early = {length: n for length, n in self._lengths().items() if length[0] < length[1]}
        if not early:
            return []
        (begun, steps), n = next(iter(early)), sum(early.values())
        where = f"after {begun} of {steps} steps" if len(early) == 1 else f"one of them after {begun} of {steps} steps"
        if any(length in early for length in self._last()):  # maps() may be asked while it runs
            where += ", or the last is not over"
        return [f"{n} of {self.runs} runs ended early, {where}: what they had computed counts, too"]

    def _summary(self, notes: list[str]) -> list[str]:
        """Return what the maps are a mean of, in three lines at most."""
        lengths = sorted({steps for _, steps in self._lengths()})
        whole = f"{self.runs} run{'s' * (self.runs != 1)}"
        if lengths:
            whole += f" of {' to '.join(str(x) for x in dict.fromkeys((lengths[0], lengths[-1])))} steps"
        where = self.model if self.pipeline is None else f"{self.model}, {self.pipeline}"
        lines = [f"mean of {self.counted} of {self.seen} calls of {where}: {whole}"]
        if self.guidance:
            lines.append("conditional samples known by " + "; ".join(self.guidance))
        if notes:
            more = f" (and {len(notes) - 1} more in .provenance)" if len(notes) > 1 else ""
            lines.append(f"note{more}: {notes[0]}")
        return lines

    def nothing(self) -> str:
        """Return why there are no maps, as far as it is known."""
        if self.passed_by:
            told = "; ".join(f"{n} {why}" for why, n in self.passed_by.items())
            return f"nothing was recorded: none of {self.seen} calls of {self.model} counted: {told}"
        if self.counted:
            return (
                f"nothing was recorded: {self.counted} calls of {self.model} ran, but no reference-carrying attention "
                "in them "
                "(an IP-Adapter of scale 0 is skipped by diffusers; a cache may have answered)"
            )
        return (
            "nothing was recorded: no reference-carrying attention has run since tracing began (run the model inside "
            "the "
            "trace; an IP-Adapter of scale 0 is skipped by diffusers)"
        )
