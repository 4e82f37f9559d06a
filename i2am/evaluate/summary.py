"""What came out of an evaluation: a table of samples, and means with confidence intervals."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from i2am.evaluate.manifest import Sample
from i2am.evaluate.scores import MEANING
from i2am.evaluate.sheet import contact_sheet
from i2am.evaluate.store import Store

COLUMNS = ("id", "status", *MEANING, "seconds", "seed", "error")
RESAMPLES = 10_000
METHOD = f"mean over samples with its 95 % confidence interval: percentile bootstrap, {RESAMPLES:,} resamples, seed 0"


def summarise(samples: Sequence[Sample], store: Store) -> dict[str, Any]:
    """Writes ``results.csv`` (and ``results.parquet``, where pyarrow is installed), ``summary.json``, ``contact.png``.

    Every finished sample of the list counts once, whichever process or run did it.
    """
    records = store.records(samples)
    store.write(store.out / "results.csv", lambda path: _csv(records, path))
    if importlib.util.find_spec("pyarrow"):
        store.write(store.out / "results.parquet", lambda path: _parquet(records, path))
    fine = [r for r in records if r["status"] == "ok"]
    summary = {
        "samples": len(samples),
        "ok": len(fine),
        "failed": len(records) - len(fine),
        "missing": len(samples) - len(records),
        "method": METHOD,
        "scores": {
            name: interval([r[name] for r in fine if name in r]) for name in (*MEANING, "seconds") if _any(fine, name)
        },
        "errors": {r["id"]: r["error"] for r in records if r["status"] != "ok"},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    store.write(store.out / "summary.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    by = next((name for name in MEANING if _any(fine, name)), None)
    if by is not None:
        figure = contact_sheet(sorted((r for r in fine if by in r), key=lambda r: -r[by]), by, store)
        store.write(store.out / "contact.png", lambda path: figure.savefig(path, format="png", dpi=150))
    return summary


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float | int | None]:
    """Count, mean, standard deviation and a 95 % confidence interval of the mean (None for fewer than two values)."""
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=float)
    found = {"n": len(x), "mean": float(x.mean()), "sd": None, "low": None, "high": None}
    if len(x) > 1:
        rng = np.random.default_rng(seed)
        result = bootstrap((x,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng, batch=500)
        low, high = result.confidence_interval
        found |= {"sd": float(x.std(ddof=1)), "low": float(low), "high": float(high)}
    return found


def said(summary: dict[str, Any]) -> str:
    """The summary as a table for people."""
    lines = [f"{summary['ok']} of {summary['samples']} samples, {summary['failed']} failed"]
    for name, s in summary["scores"].items():
        title = MEANING[name][0] if name in MEANING else "seconds a sample"
        spread = "" if s["low"] is None else f"  [{s['low']:.3f}, {s['high']:.3f}]"
        lines.append(f"{title:<18}{s['mean']:8.3f}{spread}  n = {s['n']}")
    lines += [f"failed: {name}: {error}" for name, error in list(summary["errors"].items())[:5]]
    return "\n".join(lines)


def _any(records: list[dict[str, Any]], name: str) -> bool:
    return any(name in r for r in records)


def _csv(records: list[dict[str, Any]], path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def _parquet(records: list[dict[str, Any]], path) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {"id": pyarrow.string(), "status": pyarrow.string(), "error": pyarrow.string(), "seed": pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in COLUMNS])
    rows = [{name: r.get(name) for name in COLUMNS} for r in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
