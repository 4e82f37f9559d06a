"""Writes docs/benchmarks.md, a CSV and the figures from what ``make bench`` measured.

``python -m benchmarks.report results/bench.json``; ``--page`` and ``--title`` write another page, with the tables that
were measured and without what :mod:`benchmarks.static_page` says of the GPU kernels' code.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TITLES = {
    "op": "Attention with both maps, against `scaled_dot_product_attention` without any",
    "busy 0": "Attention with both maps over `scaled_dot_product_attention`: wall time and processor time",
    "busy 6": "Beside six busy processes: the same, wall time and processor time",
    "gradient": "Forward and backward, against those of `scaled_dot_product_attention`",
    "model": "One step of a UNet, against the untraced step",
    "fixed": "Fixed cost: a UNet so small that hooks and checks are what tracing costs",
    "highres": "High-resolution super-resolution: aligned reference, one head, d 64",
    "regions": "SRAM: registered regions, against a call without",
    "answers": "SRAM: answers from recorded queries and keys, 16,384 × 16,384, one head",
}
HEADER = """# {title}

Written by `make bench`; nothing here is typed by hand. Every provider is verified against float64 before it is timed.
Providers take turns within a round, and a ratio is the median over rounds of a provider's time over the baseline's in
the same round. Memory is the growth of the resident set during one call, inputs apart; it is sampled, so a few MiB are
noise.

- `sdpa`, `untraced`: no attribution. `i2am`: output and both maps. *maps only*, *output=model*: the maps beside the
  model's own attention.
- `materialise`: eager attention that keeps the N × N tensor. `daam`: the same, keeping a heat map a key.
  `hook`: the I2AM authors' manner, forward hooks that recompute q and k. All written afresh for this suite.

Machine: {machine}{load}
"""


def rows(benchmarks: list[dict]) -> Iterator[dict]:
    """One flat row a provider of a case."""
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        for provider, found in info.get("providers", {}).items():
            yield {"table": info["table"], "case": info["case"], "provider": provider, **found}


def machine(measured: dict) -> str:
    info = measured["machine_info"]
    cpu = info["cpu"]
    return f"{cpu.get('brand_raw', info['machine'])}, {cpu.get('count')} threads, Python {info['python_version']}"


def write_csv(measured: dict, file: Path) -> None:
    """Rows of other machines and tables stay; this machine's are replaced."""
    key = machine(measured)
    tables = {row["table"] for row in rows(measured["benchmarks"])}
    kept = []
    if file.exists():
        with file.open(newline="") as source:
            kept = [row for row in csv.DictReader(source) if row["machine"] != key or row["table"] not in tables]
    fields = [
        "machine",
        "date",
        "table",
        "case",
        "provider",
        "seconds",
        "ratio",
        "lowest",
        "processor_ratio",
        "extra_bytes",
        "tflops",
    ]
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, fields)
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows(
            {"machine": key, "date": measured["datetime"][:10], **row} for row in rows(measured["benchmarks"])
        )


def markdown(measured: dict, heading: str = "Benchmarks") -> str:
    infos = [b["extra_info"] for b in measured["benchmarks"]]
    loads = [info["load_before"] for info in infos if "load_before" in info]
    load = (
        f"\n\nLoad average before each case, others' work included: {min(loads):.1f} to {max(loads):.1f}"
        if loads
        else ""
    )
    parts = [HEADER.format(title=heading, machine=machine(measured), load=load)]
    for table, title in TITLES.items():
        cases = [info for info in infos if info.get("table") == table]
        if cases:
            parts.append(f"## {title}\n\n" + "\n".join(_table(cases)) + "\n")
    for info in infos:
        if info.get("table") == "growth":
            parts.append(_growth(info))
        if info.get("table") == "record":
            sizes = ", ".join(f"{name} {nbytes / 1e6:,.0f} MB" for name, nbytes in info["record_bytes"].items())
            parts.append(f"## What a record takes\n\n{info['case']}: {sizes}.\n")
    if any(info.get("table") == "growth" for info in infos):
        parts.append("![Time and extra memory against the number of tokens](images/bench-growth.png)\n")
    return "\n".join(parts)


def _table(cases: list[dict]) -> Iterator[str]:
    names = list(dict.fromkeys(name for info in cases for name in info["providers"]))
    yield "| | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for info in cases:
        cells = [_cell(info["providers"].get(name)) for name in names]
        if "materialise" in info and "materialise" not in info["providers"]:
            cells.append("")
        yield f"| {info['case']} | " + " | ".join(cells) + " |"
    for info in cases:
        if info.get("materialise", "done") != "done":
            yield f"\n`materialise` at {info['case']}: *{info['materialise']}*"


def _cell(found: dict | None) -> str:
    if found is None:
        return ""
    memory = f"{found['extra_bytes'] / 2**20:,.0f} MiB" if "extra_bytes" in found else ""
    if found.get("ratio") != 1.0 and "processor_ratio" in found:
        shown = f"{found['ratio']:.2f} ×, {found['processor_ratio']:.2f} × processor time"
        return f"{shown}, {memory}" if memory else shown
    if "tflops" in found:
        memory += f", {found['tflops']:.0f} TFLOP/s"
    if found.get("ratio") in (None, 1.0):
        seconds = found["seconds"]
        shown = f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
        return f"{shown}, {memory}" if memory else shown
    return f"{found['ratio']:.2f} ×, {memory}"


def _growth(info: dict) -> str:
    lines = [
        f"- `{name}`: time ~ N^{row['time']:.2f}, extra memory ~ N^{row['memory']:.2f} "
        f"({', '.join(f'{peak / 2**20:,.0f}' for *_, peak in row['points'])} MiB)"
        for name, row in info["exponents"].items()
    ]
    return f"## Growth\n\n{info['case']}, fitted:\n\n" + "\n".join(lines) + "\n"


def plot(measured: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    growth = next((b["extra_info"] for b in measured["benchmarks"] if b["extra_info"].get("table") == "growth"), None)
    if growth is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, row in growth["exponents"].items():
        tokens, seconds, peaks = zip(*row["points"], strict=True)
        axes[0].loglog(tokens, seconds, "o-", label=name)
        axes[1].loglog(tokens, [max(p, 2**20) / 2**20 for p in peaks], "o-", label=name)
        for ax in axes:
            ax.set_xticks(tokens, [f"{n:,}" for n in tokens], minor=False)
            ax.set_xticks([], minor=True)
    axes[0].set(xlabel="tokens on each side", ylabel="seconds", title="Time of one call, one head, d 64")
    axes[1].set(xlabel="tokens on each side", ylabel="MiB (floor 1)", title="Memory beyond the inputs")
    for ax in axes:
        ax.grid(True, which="major", alpha=0.3)
        ax.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+", help="pytest-benchmark's JSON, of one machine")
    parser.add_argument("--title", default="Benchmarks", help="title of the page")
    parser.add_argument("--page", default="benchmarks", help="name of the page")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    measured, *more = (json.loads(file.read_text(encoding="utf-8")) for file in options.measured)
    if any(machine(other) != machine(measured) for other in more):
        raise SystemExit("these were measured on different machines: one report a machine")
    measured["benchmarks"] += [benchmark for other in more for benchmark in other["benchmarks"]]
    (options.docs / "images").mkdir(parents=True, exist_ok=True)
    write_csv(measured, options.docs / "benchmarks.csv")
    plot(measured, options.docs / "images" / "bench-growth.png")
    text = markdown(measured, options.title)
    if options.page == "benchmarks":
        from benchmarks import static_page

        text = static_page.replaced(text, "static", static_page.load())
    (options.docs / f"{options.page}.md").write_text(text, encoding="utf-8")
    print(f"wrote {options.docs}/{options.page}.md and benchmarks.csv")


if __name__ == "__main__":
    main()
