"""Plausible bugs, put in one at a time: does a test see each?

``python -m tests.mutants [AREA …]`` (not part of ``make test``: it runs an area's tests once per bug). An area is a
module of this folder, ``tests/mutants/<area>.py``, with two names::

    TESTS = ["tests/ops/test_streaming.py"]             # what is to see the bugs; paths or pytest node ids
    TESTS_OF = {"i2am/ops/tokens.py": ["tests/ops/test_tokens.py"]}      # instead, for one file's; may be left out
    MUTANTS = [
        Mutant("i2am/ops/streaming.py", "s.amax(2)", "s.amin(2)"),
        Mutant("i2am/ops/tokens.py", "low < 0", "low < -1", "a negative index is let through"),
    ]

A mutant is (file, text that occurs there exactly once, text in its place[, what is wrong]). Each is put into a copy of
the repository, never into the working tree, and the area's tests run there (see server.py) until one fails: killed. If
none does, it survived: write the test that sees it. A mutant whose text is no longer found, or that cannot be
imported, is an error of the list (``--check`` finds the former at once). Add mutants that a good engineer could have
written; one that changes nothing anyone could see (equal behaviour) does not belong here.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One bug: in ``file`` (relative to the repository) ``old``, which occurs once, becomes ``new``."""

    file: str
    old: str
    new: str
    what: str = ""

    def __str__(self) -> str:
        change = self.what or f"{self.old.strip()!r} → {self.new.strip()!r}"
        return f"{self.file}: {' '.join(change.split())}"
