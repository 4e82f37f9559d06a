"""Where maps come from: a plain dictionary that a tracer fills, kept with the maps and shown wherever they are.

Any JSON values. ``"summary"``, if there, is a list of short lines that say what the picture is a mean of: ``repr``
shows these; everything else is for tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MOST_LINES, MOST_LETTERS = 3, 110


def plain(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a copy made of JSON values alone.

    Raises:
        ValueError: it holds something else (a tensor, a class, NaN).
    """
    try:
        copy = json.loads(json.dumps({} if provenance is None else dict(provenance), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"provenance must be a dict of plain JSON values: {error}") from error
    return dict(copy)


def summary_lines(provenance: Mapping[str, Any]) -> list[str]:
    """Return at most three short lines: the summary that was given, or else the values at the top."""
    given = provenance.get("summary")
    if isinstance(given, str):
        given = given.splitlines()
    if isinstance(given, list) and given:
        lines = [str(line) for line in given]
    else:
        values = {k: v for k, v in provenance.items() if isinstance(v, (str, int, float))}
        lines = [", ".join(f"{k} {v}" for k, v in values.items())] if values else []
    return [x if len(x) <= MOST_LETTERS else x[: MOST_LETTERS - 1] + "…" for x in lines[:MOST_LINES]]


def rows(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield ``(name, value)`` of everything there is, as text; what is nested by a name like ``calls · counted``."""
    for name, value in provenance.items():
        if isinstance(value, Mapping) and value:
            for inner, text in rows(value):
                yield f"{name} · {inner}", text
        elif isinstance(value, list) and not any(isinstance(x, (Mapping, list)) for x in value):
            yield str(name), (", " if name != "summary" else "\n").join(map(_text, value)) or "none"
        elif isinstance(value, list):
            yield str(name), "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in value)
        else:
            yield str(name), _text(value)


def _text(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
