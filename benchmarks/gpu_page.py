"""The page that :mod:`benchmarks.gpu` writes of its findings."""

from __future__ import annotations


def markdown(found: dict) -> str:
    """Return the findings as a page's part."""
    there = found.get("there", {})
    lines = ["## On a GPU", "", ", ".join(f"{k} {v}" for k, v in (there | found.get("rates", {})).items()), ""]
    if "times" in found:
        names = list(dict.fromkeys(name for row in found["times"].values() for name in row))
        lines += ["Milliseconds of a captured graph (eager), and the ratio to the fastest SDPA:", ""]
        lines += ["| heads × queries × keys × d | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        for case, row in found["times"].items():
            lines.append(f"| {case} | " + " | ".join(_cell(row.get(name)) for name in names) + " |")
        lines.append("")
    checked = found.get("correctness", {})
    failures = checked.get("failures", [])
    lines += [f"Largest errors against float64, of the peak: {checked.get('largest errors, of the peak', {})}.", ""]
    lines += [f"Failures: {len(failures)}.", *(f"- {failure}" for failure in failures), ""]
    lines += [f"- {key}: {found[key]}" for key in ("memory", "exact columns") if key in found]
    return "\n".join(lines) + "\n"


def _cell(row: dict | None) -> str:
    if row is None or "failed" in row:
        return "" if row is None else "failed"
    graph = "–" if row["graph"] is None else f"{row['graph']:.3f}"
    ratio = f", {row['ratio']:.2f} ×" if "ratio" in row else ""
    return f"{graph} ({row['eager']:.3f}){ratio}"
