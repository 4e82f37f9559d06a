"""What came out of an evaluation: a table of samples, and means with their intervals. Records are read one by one."""

from __future__ import annotations

import csv
import heapq
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from i2am.evaluate import parquet
from i2am.evaluate.contact import SHOWN, contact_sheet, sheet_rows
from i2am.evaluate.manifest import Sample
from i2am.evaluate.scores import MEANING
from i2am.evaluate.store import Store

COLUMNS = ("id", "status", *MEANING, "seconds", "seed", "device", "versions", "error")
RESAMPLES = 10_000
MANY = 5_000  # values from which on the mean is as good as normal, and resampling a waste
METHOD = (
    f"mean over samples with its 95 % confidence interval: percentile bootstrap, {RESAMPLES:,} resamples, seed 0; "
    f"from {MANY:,} samples on, normal"
)
ERRORS = 100  # that the summary lists; results.csv has all


def summarise(samples: Sequence[Sample], store: Store) -> dict[str, Any]:
    """Write ``results.csv`` (and ``results.parquet``, where pyarrow is installed), ``summary.json``, ``contact.png``.

    Every finished sample of the list counts once, whichever process or run did it.
    """
    tally = _Tally()
    table = store.out / "results.csv"
    store.write(table, lambda path: _write_csv(map(tally.add, store.records(samples)), path))
    if importlib.util.find_spec("pyarrow"):
        store.write(store.out / "results.parquet", lambda path: _write_parquet(table, path))
    summary = tally.summary(len(samples))
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    store.write(store.out / "summary.json", lambda path: path.write_text(text, "utf-8", "backslashreplace"))
    by = next((name for name in MEANING if name in tally.values), None)
    if by is not None:
        rows = sheet_rows(*tally.ranked[by].ends(), store)
        sheet = contact_sheet(rows, len(tally.values[by]), by)
        store.write(store.out / "contact.png", lambda path: sheet.save(path, "png"))
    return summary


class _Tally:
    """Numbers of records that go by."""

    def __init__(self) -> None:
        self.values: dict[str, array[float]] = {}
        self.status: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.ranked = {name: _Ranking(name) for name in MEANING}

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.status["ok" if record["status"] == "ok" else "failed"] += 1
        self.versions[_show_versions(record)] += 1
        if record["status"] != "ok":
            if len(self.errors) < ERRORS:
                self.errors[record["id"]] = record["error"]
            return record
        for name in (*MEANING, "seconds"):
            if name in record:
                self.values.setdefault(name, array("d")).append(record[name])
                if name in MEANING:
                    self.ranked[name].add(record)
        return record

    def summary(self, samples: int) -> dict[str, Any]:
        return {
            "samples": samples,
            "ok": self.status["ok"],
            "failed": self.status["failed"],
            "missing": samples - self.status.total(),
            "method": METHOD,
            "scores": {name: interval(self.values[name]) for name in (*MEANING, "seconds") if name in self.values},
            "versions": dict(self.versions.most_common()),  # of how many samples each
            "errors": self.errors,
        }


class _Ranking:
    """The ``SHOWN`` best and worst of records that go by, by one score; of equal ones the first counts as better."""

    def __init__(self, by: str):
        self.by, self.count = by, 0
        self.best: list[tuple[float, int, dict[str, Any]]] = []
        self.worst: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, record: dict[str, Any]) -> None:
        value = record[self.by]
        for heap, item in ((self.best, (value, -self.count, record)), (self.worst, (-value, self.count, record))):
            heapq.heappush(heap, item)  # its smallest goes: the worst of the best, the best of the worst
            if len(heap) > SHOWN:
                heapq.heappop(heap)
        self.count += 1

    def ends(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the best, best first, and of the others the worst, worst last."""
        half = min(SHOWN, (self.count + 1) // 2)
        best = [record for *_, record in sorted(self.best, key=lambda x: x[:2], reverse=True)][:half]
        worst = [record for *_, record in sorted(self.worst, key=lambda x: x[:2])]
        return best, worst[len(worst) - min(SHOWN, self.count - half) :]


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float | int | None]:
    """Return count, mean, standard deviation and a 95 % confidence interval of the mean (None below two values)."""
    x = np.asarray(values, dtype=float)
    found: dict[str, float | int | None] = {"n": len(x), "mean": float(x.mean()), "sd": None, "low": None, "high": None}
    if len(x) < 2:
        return found
    sd = float(x.std(ddof=1))
    if len(x) >= MANY:
        half = 1.959963985 * sd / math.sqrt(len(x))
        return found | {"sd": sd, "low": float(x.mean()) - half, "high": float(x.mean()) + half}
    from scipy.stats import bootstrap

    rng = np.random.default_rng(seed)
    result = bootstrap((x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng, batch=500)
    low, high = result.confidence_interval
    return found | {"sd": sd, "low": float(low), "high": float(high)}


def format_table(summary: dict[str, Any]) -> str:
    """Return the summary as a table for people."""
    missing = f", {summary['missing']} not done" if summary["missing"] else ""
    lines = [f"{summary['ok']} of {summary['samples']} samples, {summary['failed']} failed{missing}"]
    for name, s in summary["scores"].items():
        title = MEANING[name][0] if name in MEANING else "seconds a sample"
        spread = "" if s["low"] is None else f"  [{s['low']:.3f}, {s['high']:.3f}]"
        lines.append(f"{title:<18}{s['mean']:8.3f}{spread}  n = {s['n']}")
    if len(summary["versions"]) > 1:
        lines += [f"made with {versions}: {count} samples" for versions, count in summary["versions"].items()]
    lines += [f"failed: {name}: {error}" for name, error in itertools.islice(summary["errors"].items(), 5)]
    return "\n".join(lines)


def _show_versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def _row(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record's columns of the table."""
    return {name: record.get(name) for name in COLUMNS} | {"versions": _show_versions(record)}


def _write_csv(records: Iterable[dict[str, Any]], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(_row, records))


def _write_parquet(table: Path, path: Path) -> None:
    """Write the table again, with types.

    Raises:
        OSError: it cannot be written.
    """
    texts = ("id", "status", "device", "versions", "error")
    types = dict.fromkeys(COLUMNS, "float64") | dict.fromkeys(texts, "string") | {"seed": "int64"}
    command = [sys.executable, parquet.__file__, str(table), str(path), json.dumps(types)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        number, _, text = done.stderr.rstrip().rpartition("\n")[2].partition(" ")
        raise OSError(int(number) if number.isdigit() else 0, text or f"no Parquet: exit status {done.returncode}")
