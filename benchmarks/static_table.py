"""Registers, spills, instructions and issue clocks of every kernel that a launcher would start, per Triton version.

``python -m benchmarks.static --table [--arch sm_80,sm_90] [--dtypes fp16] [--head-dims 40,64] [--variants plain,…]``
compiles them with the Triton at hand and replaces its rows in ``static.json``; by default all, which are some hundred
kernels of a few seconds each. Another Triton is a folder before the others in ``PYTHONPATH``. What does not compile is
a row, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from benchmarks import aot, sass

HEAD_DIMS = (40, 64, 72, 80, 88, 128, 160, 256)
VARIANTS = {  # of each dtype: the code of bfloat16 is that of float16 but for conversions, so its list is shorter
    "fp16": tuple(aot.VARIANTS),
    "bf16": ("plain", "image tokens", "bool mask", "regions", "no output"),
    "fp32": ("plain", "image tokens", "bool mask", "regions", "no output"),
}
LOOPS = {"few-forward": 2}  # main loops that usual tiles go through; the others take what is out of the ordinary
NO_LOOP = ("columns", "accumulate")  # these multiply in the exception alone
SCORES, ISSUED = 8192, 4  # scores that clocks are given for; instructions a clock of one processor

Row = list[int]  # registers and spilled bytes of a thread, instructions of the kernel, issue clocks for SCORES scores
Rows = dict[str, dict[str, Row | str]]  # "kernel, dtype, variant" → head dim → row, or why there is none


def rows(arch: str, dtypes: Iterable[str], d: int, variants: Iterable[str] | None) -> Iterator[tuple[str, Row | str]]:
    """Yield ``("kernel, dtype, variant", row)`` of every kernel of one head dim; ``variants``: None for all."""
    for dtype in dtypes:
        for c in aot.configurations(aot.TARGETS[arch], [dtype], [d], variants or VARIANTS[dtype]):
            kernel, variant = c.name.split(f" {dtype} d={d} ")
            yield f"{kernel}, {dtype}, {variant}", _row(kernel, c, arch)


def _row(kernel: str, c: aot.Configuration, arch: str) -> Row | str:
    try:
        compiled = aot.compile_for(c, arch)
    except Exception as error:  # a compiler's failure is what the record is for
        return f"{type(error).__name__}: {' '.join(str(error).split())[-120:]}"
    found = aot.inspect(compiled, arch)
    issue = 0.0
    if kernel not in NO_LOOP:
        loops = list(sass.main_loops(aot.assembly(compiled, arch), rare=kernel == "attribution"))
        for loop in loops[: LOOPS.get(kernel, 1)]:
            issue += len(loop) * c.tiles.num_warps / (c.tiles.m * c.tiles.n) * SCORES / ISSUED
    return [found["registers"], found["spills"], sum(found["sass"].values()), round(issue)]


def update(
    record: Path,
    architectures: Iterable[str],
    dtypes: Iterable[str] = tuple(VARIANTS),
    head_dims: Iterable[int] = HEAD_DIMS,
    variants: Iterable[str] | None = None,
) -> None:
    """Replace this Triton's rows in the record, head dim by head dim; rows that are not asked for stay as they are."""
    for arch in architectures:
        for d in head_dims:
            found = list(rows(arch, dtypes, d, variants))
            kept = json.loads(record.read_text(encoding="utf-8"))
            table = kept.setdefault("tables", {}).setdefault(triton.__version__, {}).setdefault(arch, {})
            for name, row in found:
                table.setdefault(name, {})[str(d)] = row
                print(arch, name, d, row, flush=True)
            write(record, kept)


def write(record: Path, found: dict) -> None:
    """Write the record with one kernel, dtype and variant a line."""
    tables = found.get("tables", {})
    rest = json.dumps({key: value for key, value in found.items() if key != "tables"}, indent=1)
    versions = []
    for version in sorted(tables, key=lambda name: tuple(map(int, name.split(".")))):
        archs = []
        for arch, table in sorted(tables[version].items()):
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
            archs.append(f"   {json.dumps(arch)}: {{\n{lines}\n   }}")
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(archs) + "\n  }")
    body = rest[:-2] + (",\n" if len(rest) > 2 else "\n") + ' "tables": {\n' + ",\n".join(versions) + "\n }\n}\n"
    record.write_text(body, encoding="utf-8")
