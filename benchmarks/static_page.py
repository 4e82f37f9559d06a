"""``python -m benchmarks.static_page``: write what ``static.json`` records into the pages that say it.

A page's part lies between ``<!-- NAME: written by python -m benchmarks.static_page -->`` and ``<!-- NAME: end -->``;
``tests/kernels/test_static.py`` holds the pages to the record. Nothing is compiled here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import static, static_model, static_table
from i2am.kernels.tiles import attention_tiles, attribution_tiles

ROOT = Path(__file__).parent.parent
KERNELS = {
    "attention": "pass 1",
    "attribution": "pass 2",
    "columns": "columns",
    "sweep-columns": "sweep, G2R and columns",
    "sweep": "sweep, R2G",
    "few-forward": "few keys, first",
    "few-attribution": "few keys, second",
    "few-attribution, 2 references,": "few keys, second, 2 references",
}
VARIANTS = {
    "plain": "",
    "edge": "1,025 keys",
    "image tokens": "257 keys",
    "one tile": "49 keys",
    "few keys": "16 keys",
    "padded text": "77 keys, padding mask",
    "image tokens with regions": "257 keys, 16 regions",
    "bool mask": "bool mask a row",
    "additive mask": "additive mask a row",
    "regions": "16 regions",
    "no output with mass": "maps only, mass",
    "no output": "maps only",
}


def version_key(version: str) -> tuple[int, ...]:
    """Order versions as numbers."""
    return tuple(map(int, version.split(".")))


def spills(record: dict) -> Iterator[str]:
    """Yield the lines of the table of spills and issue clocks, and what other versions and dtypes spill."""
    tables = record["tables"]
    shown = record.get("costs", {}).get("triton") or max(tables, key=version_key)
    for arch, table in sorted(tables[shown].items(), reverse=True):
        rarely = static_table.NO_LOOP  # their clocks are those of an exception
        chosen = {name: row for name, row in table.items() if ", fp16, " in name and name.split(", ")[0] not in rarely}
        head_dims = sorted({int(d) for row in chosen.values() for d in row})
        yield f"**{arch}, fp16, Triton {shown}**: issue clocks of the main loops for 8,192 scores; **bytes** spilled."
        yield ""
        yield "| | " + " | ".join(f"d {d}" for d in head_dims) + " |"
        yield "|---" * (1 + len(head_dims)) + "|"
        for name, row in chosen.items():
            yield f"| {_label(name)} | " + " | ".join(_cell(row.get(str(d))) for d in head_dims) + " |"
        yield ""
    yield "What spills (bytes) or does not compile, of all that was read:"
    yield ""
    for version in sorted(tables, key=version_key, reverse=True):
        for arch, table in sorted(tables[version].items()):
            rows = [(name, d, row) for name, per in table.items() for d, row in per.items()]
            found: dict[str, list[str]] = {}
            for name, d, row in rows:
                if isinstance(row, str) or row[1]:
                    what = row.split(":")[0] if isinstance(row, str) else str(row[1])
                    found.setdefault(_label(name, dtype=True), []).append(f"d {d} {what}")
            said = "; ".join(f"{name} {', '.join(per)}" for name, per in found.items()) or "nothing"
            yield f"- Triton {version}, {arch}, {len(rows)} kernels read: {said}."


def _label(name: str, dtype: bool = False) -> str:
    kernel, kind, variant = re.fullmatch(r"(.+), (fp16|bf16|fp32), (.+)", name).groups()
    label = KERNELS.get(kernel, kernel)
    shown = VARIANTS.get(variant, variant)
    return label + (f", {shown}" if shown else "") + (f", {kind}" if dtype and kind != "fp16" else "")


def _cell(row: list[int] | str | None) -> str:
    if row is None or isinstance(row, str):
        return "–" if row is None else "no"
    _, spilled, _, issue = row
    clocks = f"{issue:,}" if issue else "·"
    return f"{clocks}, **{spilled} B**" if spilled else clocks


def few(record: dict) -> Iterator[str]:
    """Yield the lines of the table of few keys."""
    yield f"Read from the code of Triton {record['costs']['triton']}; nothing here has run on a GPU."
    yield ""
    yield "| keys | four launches: tiles, pass 1 + pass 2 | two launches: tiles, first + second | ratio |"
    yield "|---|---|---|---|"
    for keys, ways in record["costs"]["few"].items():
        cells, padded = [], []
        for way in ("four launches", "two launches"):
            found = ways[way]
            parts = list(found["clocks"].values())
            padded.append(sum(parts) * found["padded"])
            summed = f"{' + '.join(f'{x:,}' for x in parts)} = {sum(parts):,}"
            cells.append(f"{found['m']} × {found['n']}: {summed} ({found['padded']} keys padded)")
        yield f"| {keys} | " + " | ".join(cells) + f" | {padded[1] / padded[0]:.2f} |"


COSTS = """## The GPU kernels' code, without a GPU

**Compiled ahead of time with Triton {triton} and read; nothing here has run on a GPU.** `python -m benchmarks.static`:
registers and spilled bytes a thread, shared memory a program; then the clocks that each pipe needs for 128 × 64 scores
on one processor. *largest pipe* is the sum over passes of the largest pipe's clocks: a lower limit. What everything
spills, by head dim, dtype, mask and Triton version, is in kernels/README.md.
"""
PREDICTION = """## Predicted for an H100, against published forwards

No measurement: a model of counts (`benchmarks/static_model.py`), Triton {triton}. A kernel's clocks are those of its
matrix products plus those of its busiest other pipe, at peak rates, or of its loads if these take longer; launches, the
grid's tail and the merge between the passes are left out. It has no free parameter. Published rates: Figure 5 of the
FlashAttention-3 paper (arXiv 2407.08608v2: H100 SXM5 at 1,830 MHz, fp16, not causal, 16,384 tokens; cuDNN 9.1.1,
FlashAttention 2.5.8, Triton's nightly of April 2024; read from a transcription of the figure, not from its source).
Held against kernels whose rates are known, in clocks of one processor for 128 × 64 scores:
"""
BY_HAND = """FlashAttention-3's counts are by hand: two products and one exponential a score. The tutorial's are of its
pointer form, compiled here by a later Triton than the published rates are of; its form by tensor descriptors comes to
{tma} by the same model. So a kernel that is specialised by hand reaches the model, and what Triton compiled
took 1.2 to 1.5 times as long: hence the last rows.
"""


def costs(record: dict) -> Iterator[str]:
    """Yield what the kernels' code costs."""
    yield COSTS.format(triton=record["costs"]["triton"])
    yield "```text"
    tables = []
    for key, rows in sorted(record["costs"]["rows"].items()):
        arch, d = key.split(" d=")
        tables.append("\n".join(static.show(arch, int(d), static.read(rows))))
    yield from "\n\n".join(tables).splitlines()
    yield "```"


def prediction(record: dict) -> Iterator[str]:
    """Yield what the model says of the published kernels, and of i2am."""
    m = static_model
    rows = {d: static.read(record["costs"]["rows"][f"sm_90 d={d}"]) for d in (64, 128)}
    yield PREDICTION.format(triton=record["costs"]["triton"])
    yield "| | d 64: model, published | ratio | d 128: model, published | ratio |"
    yield "|---|---|---|---|---|"
    counted = {
        m.FASTEST: {d: m.Prediction(2 * d * m.SCORES / 2048, m.SCORES / 16) for d in (64, 128)},
        "Triton's tutorial": {d: m.predict(rows[d]["tutorial flash, 8 warps"].clocks) for d in (64, 128)},
    }
    for name, per in counted.items():
        cells = []
        for d, p in per.items():
            there = m.published(name, d)
            cells.append(f"{p.clocks:,.0f}, {there:,.0f} | {there / p.clocks:.2f}")
        yield f"| {name} | " + " | ".join(cells) + " |"
    later = m.clocks(m.TUTORIAL_LATER[128], 128)
    p = counted["Triton's tutorial"][128]
    yield f"| the same, three months later | – | – | {p.clocks:,.0f}, {later:,.0f} | {later / p.clocks:.2f} |"
    yield ""
    yield BY_HAND.format(tma=" and ".join(f"{_tutorial(rows[d]):,.0f} (d {d})" for d in rows))
    yield "| predicted | d 64 | d 128 |"
    yield "|---|---|---|"
    hopper = static.aot.TARGETS["sm_90"]
    loads = {
        d: (
            m.loads(2, d, attention_tiles(d, 2, hopper, None, 4096).m),
            m.loads(1, d, attribution_tiles(d, 2, hopper).n),
        )
        for d in rows
    }
    passes = {
        d: [m.predict(rows[d][name].clocks, each) for name, each in zip(static.OURS.values(), loads[d], strict=True)]
        for d in rows
    }
    for i, name in enumerate(static.OURS.values()):
        cells = [f"{p[i].tensor:,.0f} + {p[i].other:,.0f} = {p[i].clocks:,.0f}" for p in passes.values()]
        yield f"| {name}: products + busiest other pipe | " + " | ".join(cells) + " |"
    cells = [" and ".join(f"{p.loads:,.0f}" for p in each) for each in passes.values()]
    yield "| loads from the second-level cache, behind these | " + " | ".join(cells) + " |"
    total = {d: sum(p.clocks for p in passes[d]) for d in rows}
    yield "| O + R2G + G2R | " + " | ".join(f"{total[d]:,.0f}" for d in rows) + " |"
    for name in m.PUBLISHED:
        cells = []
        for d in rows:
            ratio, goal = total[d] / m.published(name, d), m.GOALS.get((name, d))
            cells.append(f"**{ratio:.2f} ×**" + (_verdict(ratio, goal) if goal else ""))
        yield f"| over {name}{', PyTorch’s usual choice' * (name == m.USUAL)} | " + " | ".join(cells) + " |"
    slower = {64: m.published("Triton's tutorial", 64), 128: later}
    slower = {d: clocks / counted["Triton's tutorial"][d].clocks for d, clocks in slower.items()}
    for name in (m.FASTEST, m.USUAL):
        cells = []
        for d in rows:
            ratio, goal = slower[d] * total[d] / m.published(name, d), m.GOALS.get((name, d))
            cells.append(f"{ratio:.2f} ×" + (_verdict(ratio, goal) if goal else ""))
        yield f"| over {name}, if ours are as far from the model as the tutorial | " + " | ".join(cells) + " |"
    cells = [f"{m.floor(d):,.0f}: {m.floor(d) / m.published(m.FASTEST, d):.2f} ×" for d in rows]
    yield f"| floor: 3 products and 2 exponentials a score, over {m.FASTEST} | " + " | ".join(cells) + " |"


def _verdict(ratio: float, goal: float) -> str:
    return f" (goal {goal}: met)" if ratio <= goal else f" (goal {goal}: missed by {100 * (ratio / goal - 1):.0f} %)"


def _tutorial(rows: dict[str, static.Cost]) -> float:
    return min(static_model.predict(c.clocks).clocks for name, c in rows.items() if name.startswith("tutorial by TMA"))


PARTS: dict[str, tuple[Path, tuple[Callable[[dict], Iterator[str]], ...]]] = {
    "spills": (ROOT / "kernels" / "README.md", (spills,)),
    "few keys": (ROOT / "kernels" / "README.md", (few,)),
    "static": (ROOT / "docs" / "benchmarks.md", (costs, prediction)),
}


def part(name: str, record: dict) -> str:
    """Return a part of a page, its markers included."""
    texts = ["\n".join(lines(record)) for lines in PARTS[name][1]]
    begin = f"<!-- {name}: written by python -m benchmarks.static_page -->"
    return "\n\n".join([begin, *texts, f"<!-- {name}: end -->"])


def replaced(page: str, name: str, record: dict) -> str:
    """Return a page with one of its parts written anew; a page without its markers gets it at its end."""
    pattern = rf"<!-- {name}: written by .*?<!-- {name}: end -->"
    new = part(name, record)
    if re.search(pattern, page, re.S) is None:
        return page.rstrip() + "\n\n" + new + "\n"
    return re.sub(pattern, lambda _: new, page, flags=re.S)


def load() -> dict:
    """Return the record."""
    return json.loads(static.RECORD.read_text(encoding="utf-8"))


def write() -> None:
    """Write every part into its page."""
    record = load()
    for name, (page, _) in PARTS.items():
        page.write_text(replaced(page.read_text(encoding="utf-8"), name, record), encoding="utf-8")
        print(f"wrote {name} of {page.relative_to(ROOT)}")


if __name__ == "__main__":
    write()
