"""Manifests: what to evaluate. CSV with a header, or JSON lines; paths are relative to the manifest's folder."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2am.detect import Box

FILES = ("reference", "image", "mask", "reference_mask", "control_image")
TEXTS = ("prompt", "negative_prompt")
COLUMNS = ("id", *FILES, *TEXTS, "seed", "box")
ID = re.compile(r"[\w-][\w.-]{0,99}")


@dataclass(frozen=True)
class Sample:
    """One row of a manifest."""

    id: str
    seed: int
    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    box: Box | None = None  # of the true object, in pixels of the generated image
    digest: str = ""  # of the row: a finished sample counts only while its row stays what it was


def read_manifest(path: Path, seed: int = 0) -> list[Sample]:
    """The samples of a manifest.

    Columns: ``reference``, and as the pipeline needs them ``image``, ``mask``, ``control_image``, ``prompt``,
    ``negative_prompt``; ``reference_mask`` and ``box`` ("top left bottom right") for the scores; ``id`` (a file name;
    the row's number where there is none) and ``seed`` (drawn from ``seed`` and the id where there is none, so that it
    depends neither on order nor on other rows). Empty cells are as if they were not there.

    Raises:
        ValueError: not such a file; unknown columns; an id or a seed that is none, or an id twice. Names the line.
    """
    path = Path(path)
    samples, lines = [], {}
    for line, row in _rows(path):
        sample = _sample(row, f"{path}, line {line}", f"row-{len(samples) + 1:05d}", path.parent, seed)
        if sample.id in lines:
            raise ValueError(f"{path}, line {line}: id {sample.id!r} is that of line {lines[sample.id]} already")
        lines[sample.id] = line
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path} has no samples")
    return samples


def columns_of(samples: list[Sample]) -> set[str]:
    """Columns that some sample fills."""
    return {name for s in samples for name in (*s.files, *s.texts)}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, cells) of each row."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path} is neither .csv nor .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no manifest {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    yield from (_csv if path.suffix == ".csv" else _jsonl)(path, text)


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))  # a quoted cell may hold lines
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {reader.line_num}: it has not as many cells as the header")
        yield reader.line_num, row


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: not an object with names and values")
        yield line, row


def _sample(row: dict[str, Any], where: str, number: str, folder: Path, seed: int) -> Sample:
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"{where}: no such column as {', '.join(unknown)}; there are {', '.join(COLUMNS)}")
    cells = {name: value for name, value in row.items() if value not in (None, "")}
    name = str(cells.get("id", number))
    if not ID.fullmatch(name):
        raise ValueError(f"{where}: id {name!r} is no file name of letters, digits, - . and _")
    wrong = [c for c in (*FILES, *TEXTS) if not isinstance(cells.get(c, ""), str)]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {cells[wrong[0]]!r}, not a text")
    own = _seed(cells["seed"], where) if "seed" in cells else derived_seed(seed, name)
    return Sample(
        id=name,
        seed=own,
        files={c: folder / cells[c] for c in FILES if c in cells},
        texts={c: cells[c] for c in TEXTS if c in cells},
        box=_box(cells["box"], where) if "box" in cells else None,
        digest=hashlib.sha256(json.dumps([cells, own], sort_keys=True).encode()).hexdigest()[:16],
    )


def derived_seed(seed: int, name: str) -> int:
    """A sample's own seed, from a run's and its id."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def _seed(value: Any, where: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise ValueError(f"{where}: seed {value!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _box(value: Any, where: str) -> Box:
    parts = value if isinstance(value, list) else str(value).split()
    if len(parts) != 4 or not all(re.fullmatch(r"\d+", str(p)) for p in parts):
        raise ValueError(f"{where}: box {value!r} is not four pixels: top left bottom right")
    box = Box(*map(int, parts))
    if box.top >= box.bottom or box.left >= box.right:
        raise ValueError(f"{where}: box {value!r} is empty")
    return box
