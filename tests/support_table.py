"""What is supported, noted by the tests: ``python -m tests.support_table`` runs them and writes docs/support.md.

A test of a family says which row it belongs to; the directions and levels of that row are those that :func:`check` has
compared with a materialised recomputation while the test ran. Nothing in the tables is written by hand but names.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from i2am.families.registry import takes_pictures, verdict_on
from tests.helpers.truth import assert_peak, assert_sram

PAGE = Path(__file__).parent.parent / "docs" / "support.md"
FILES = ("families/test_*.py", "tracing/test_compatibility.py")
DIRECTIONS = ("r2g", "g2r", "mass")
LEVELS = ("ulam", "tlam", "hlam", "llam")


@dataclass
class Row:
    """One line of a table, and what its tests have shown in this session."""

    name: str
    cells: tuple[str, ...]
    tests: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    seen: set[tuple[str, str]] = field(default_factory=set)  # (direction, level)

    @property
    def complete(self) -> bool:
        return self.tests == self.passed


FAMILIES: dict[str, Row] = {}
LIVING: dict[str, Row] = {}
REFUSED: dict[str, Row] = {}
SHOWN: set[str] = set()  # models and pipelines whose maps a test has compared with the truth
RECORDED: set[str] = set()  # those of which it has also asked a patch, of recorded queries and keys
_running: list[Row] = []


def family(name: str, pipelines: str, keys: str):
    """Marks a test as one of a family's. ``keys``: where the reference is among the attention keys."""
    return _mark(FAMILIES.setdefault(name, Row(name, (pipelines, keys))))


def living(name: str, verdict: str, note: str = ""):
    """Marks the test of living with something else. ``verdict``: works, refuses or passes by."""
    return _mark(LIVING.setdefault(name, Row(name, (verdict, note))))


def refused(name: str, reason: str) -> None:
    """Notes a pipeline that was refused, and the reason that the error gave."""
    REFUSED[name] = Row(name, (reason,))


def note(direction: str, *levels: str) -> None:
    """Notes that the running test has compared these levels of a direction with the truth."""
    for row in _running:
        row.seen |= {(direction, level) for level in levels}


def check(maps, truth, T, directions=("r2g", "g2r", "mass"), **options) -> None:
    """Compares every level with the truth, and notes it."""
    SHOWN.update(str(maps.provenance.get(what)) for what in ("model", "pipeline"))
    asked(maps, truth, directions, **options)
    for direction in directions:
        assert_peak(maps.ulam(direction, **options), truth.ulam(direction))
        assert_peak(maps.tlam(direction, **options), truth.tlam(direction, T))
        assert_peak(maps.hlam(direction, **options), truth.hlam(direction))
        assert_peak(maps.llam(direction, **options), truth.llam(direction))
        note(direction, *LEVELS)


def asked(maps, truth, directions, **options) -> None:
    """Compares the SRAM of a patch with the truth, where it was recorded and there is one, and notes it."""
    if maps.recorded:
        RECORDED.update(str(maps.provenance.get(what)) for what in ("model", "pipeline"))
        if "g2r" in directions:
            assert_sram(maps, truth, **options)


def _mark(row: Row):
    def decorate(test):
        row.tests.add(test.__qualname__)

        @functools.wraps(test)
        def marked(*args, **kwargs):
            _running.append(row)
            try:
                result = test(*args, **kwargs)
            finally:
                _running.remove(row)
            row.passed.add(test.__qualname__)
            return result

        return marked

    return decorate


# ------------------------------------------------------------------------------------------------ every pipeline

OPTIONAL = ("Kolors", "ConsisID")  # pipelines that need packages beside diffusers: their names are in it without them
NO_PIPELINE = ("Modular", "Onnx", "Blocks", "Output", "AutoPipeline", "Config")


def pipelines_with_pictures() -> dict[str, type]:
    """Returns every pipeline of the installed diffusers that takes a picture, by name."""
    import diffusers

    found = {}
    for name in sorted(dir(diffusers)):
        if "Pipeline" not in name or any(part in name for part in NO_PIPELINE):
            continue
        kind = getattr(diffusers, name)
        optional = name.startswith(OPTIONAL)
        if optional or (issubclass(kind, diffusers.DiffusionPipeline) and takes_pictures(kind)):
            found[name] = kind
    return found


def every_pipeline() -> tuple[list[str], list[str]]:
    """Returns the rows of all pipelines that take a picture, and the names of those of which nothing is known."""
    rows, unknown = [], []
    for name, kind in pipelines_with_pictures().items():
        verdict = verdict_on(kind)
        if verdict is None:
            unknown.append(name)
            continue
        means = []
        if verdict.family is not None:
            means.append("yes" if verdict.keys is None else f"with `{verdict.keys}` weights")
        if verdict.adapter:
            means.append("IP-Adapter" if not means else "and by IP-Adapter")
        rows.append(line(name, " ".join(means) or "–", verdict.refused or ""))
    return rows, unknown


def not_shown(seen: set[str] = SHOWN) -> list[str]:
    """Returns the families that trace a pipeline as it is, and of which no test of this session has shown one.

    Args:
        seen: :data:`SHOWN`, or :data:`RECORDED`: shown with a record.
    """
    families = {verdict_on(kind).family for kind in pipelines_with_pictures().values() if verdict_on(kind) is not None}
    return sorted(family.__name__ for family in families if family is not None and not _among(family, seen))


def _among(family, seen: set[str]) -> bool:
    return bool(seen & set(family.models)) or any(
        fnmatch.fnmatchcase(name, facts.pattern) for name in seen for facts in family.pipelines
    )


# ----------------------------------------------------------------------------------------------------------- page


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def family_line(row: Row) -> str:
    def shown(direction: str) -> str:
        levels = {level for d, level in row.seen if d == direction}
        if not levels:
            return "–"
        return "all levels" if levels >= set(LEVELS) else ", ".join(x.upper() for x in LEVELS if x in levels)

    return line(row.name, *row.cells, *(shown(d) for d in DIRECTIONS))


def living_line(row: Row) -> str:
    return line(row.name, *row.cells)


def page() -> str:
    """docs/support.md, from what this session's tests have shown."""
    parts = [
        "<!-- Written by `python -m tests.support_table` from the tests; do not edit. -->",
        "# What i2am works with",
        "",
        "Each row is a full pipeline or model, built from a small configuration, whose maps equal a float64 "
        "recomputation from its own q, k and mask to 2e-5 of the peak, in the directions and levels named.",
        "",
        line("family", "pipelines", "reference keys", "R2G", "G2R", "mass"),
        line(*["---"] * 6),
        *(family_line(row) for row in FAMILIES.values()),
        "",
        "“–”: there is no such map (tokens without a layout, or all keys are the reference), and asking for it raises "
        "with the reason. Wherever there is G2R there is SRAM.",
        "",
        "## No reference keys",
        "",
        'Refused by default, with the reason; `mode="self"` gives maps of spatial self-attention, which are named so.',
        "",
        line("pipeline", "reason"),
        line("---", "---"),
        *(living_line(row) for row in REFUSED.values()),
        "",
        f"## Every pipeline of diffusers {version('diffusers')}",
        "",
        "All that take a picture or a video. Traced: its reference is among the attention keys and i2am reads it, as "
        "it is or with an IP-Adapter; otherwise why not. Pipelines that are assembled of modular blocks are not "
        "listed; trace the transformer of one with `i2am.patch_transformer`.",
        "",
        line("pipeline", "traced", "otherwise"),
        line("---", "---", "---"),
        *every_pipeline()[0],
        "",
        "## Living with the rest",
        "",
        line("with", "", "how"),
        line("---", "---", "---"),
        *(living_line(row) for row in LIVING.values()),
        "",
    ]
    return "\n".join(parts)


def main() -> int:
    import pytest

    from tests import support_table as support

    here = Path(__file__).parent
    files = sorted(str(path) for pattern in FILES for path in here.glob(pattern))
    code = pytest.main([*files, "-q", "-p", "no:cacheprovider"])
    untold = [row.name for rows in (support.FAMILIES, support.LIVING) for row in rows.values() if not row.complete]
    if code == 0 and untold:
        print(f"nothing written: tests of {', '.join(untold)} were skipped")
        return 1
    missing = support.not_shown() + support.not_shown(support.RECORDED)
    if code == 0 and (unknown := support.every_pipeline()[1] + missing):
        print(f"nothing written: nothing is known of, or no test shows, {', '.join(unknown)}")
        return 1
    if code == 0:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(support.page(), encoding="utf-8")
        print(f"wrote {PAGE}")
    return code


if __name__ == "__main__":
    sys.exit(main())
