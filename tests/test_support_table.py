"""docs/support.md is what the tests show. Runs after them (conftest.py puts it last)."""

import importlib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests import support_table as support

HERE = Path(__file__).parent
EVERY = "## Every pipeline of diffusers "


@pytest.fixture(scope="module")
def lines():
    return support.PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_names_what_the_tests_name(lines):
    for pattern in support.FILES:
        for path in HERE.glob(pattern):
            importlib.import_module(".".join(("tests", *path.relative_to(HERE).with_suffix("").parts)))
    named = {row.split(" | ")[0].removeprefix("| ") for row in lines if row.startswith("| ")}
    missing = (support.FAMILIES.keys() | support.LIVING.keys()) - named
    assert not missing, f"run python -m tests.support_table: docs/support.md lacks {missing}"
    known = support.FAMILIES.keys() | support.LIVING.keys() | {"family", "pipeline", "with", "---"}
    every = next(i for i, row in enumerate(lines) if row.startswith(EVERY))
    section = lines.index("## No reference keys"), lines.index("## Living with the rest")
    named = {
        row.split(" | ")[0].removeprefix("| ") for row in (*lines[:every], *lines[section[1] :]) if row.startswith("| ")
    }
    refused = {row.split(" | ")[0].removeprefix("| ") for row in lines[slice(*section)] if row.startswith("| ")}
    assert named - refused <= known, "run python -m tests.support_table: docs/support.md has rows that no test backs"


def test_the_page_says_what_the_tests_have_shown(lines):
    shown = [support.family_line(row) for row in support.FAMILIES.values() if row.passed and row.complete]
    shown += [support.living_line(row) for row in support.LIVING.values() if row.passed and row.complete]
    shown += [support.living_line(row) for row in support.REFUSED.values()]
    if not shown:
        pytest.skip("none of the tests behind the page ran in this session")
    stale = [row for row in shown if row not in lines]
    assert not stale, "run python -m tests.support_table; rows that differ:\n" + "\n".join(stale)


def test_every_pipeline_that_takes_a_picture_has_a_row(lines):
    """A new release of diffusers fails here, and names its new pipelines: say in a family's file what they do."""
    written = next(row.removeprefix(EVERY) for row in lines if row.startswith(EVERY))
    if Version(version("diffusers")) < Version(written):
        pytest.skip(f"docs/support.md is about diffusers {written}")
    rows, unknown = support.every_pipeline()
    assert not unknown, f"nothing is known of {', '.join(unknown)}: add PipelineFacts in i2am/families"
    assert len(rows) > 200
    stale = [row for row in rows if row not in lines]
    assert not stale, "run python -m tests.support_table; rows that differ:\n" + "\n".join(stale)


def test_every_family_that_traces_a_pipeline_is_shown_by_a_test():
    if not support.FAMILIES or not all(row.complete for row in support.FAMILIES.values()):
        pytest.skip("not all tests of families ran in this session")
    assert not support.not_shown()
    assert not support.not_shown(support.RECORDED), "no test of these passes record='qk'"
