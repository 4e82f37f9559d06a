"""Manifests: what to evaluate. Where rows come from is ``sources``' business, what they mean is decided here."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from i2am.detect import Box
from i2am.evaluate.sources import Embedded, Picture, rows_of

FILES = ("reference", "image", "mask", "reference_mask", "control_image")
TEXTS = ("prompt", "negative_prompt")
COLUMNS = ("id", *FILES, *TEXTS, "seed", "box")
ID = re.compile(r"[\w-][\w.-]*")
ROW = json.JSONEncoder(sort_keys=True)
LONGEST_ID = 200  # bytes: with a suffix it is a file's name


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a manifest."""

    id: str
    seed: int
    files: Mapping[str, Picture] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    box: Box | None = None  # of the true object, in pixels of the generated image
    digest: str = ""  # of the row: a finished sample counts only while its row stays what it was


class Files(Mapping[str, Picture]):
    """The pictures of a row, by column; a path is made when it is asked for.

    Args:
        folder: to which paths are relative.
        cells: the row's.
    """

    __slots__ = ("_cells", "_folder")

    def __init__(self, folder: str, cells: Mapping[str, Any]):
        self._folder = folder
        self._cells = {name: cells[name] for name in FILES if name in cells}

    def __getitem__(self, name: str) -> Picture:
        place = self.place(name)
        return Path(place) if isinstance(place, str) else place

    def place(self, name: str) -> str | Embedded:
        """Return where a picture is: a file's path, as text."""
        cell = self._cells[name]
        return os.path.join(self._folder, cell) if isinstance(cell, str) else cell

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


class Rows:
    """Rows of cells, compressed in blocks of which the last one that was asked for lies open: tens of bytes a row."""

    BLOCK = 256  # rows

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._newest: list[tuple[Any, ...]] = []  # rows behind the packed ones
        self._open: tuple[int, list[tuple[Any, ...]]] = (-1, [])  # number of a block, and its rows

    def append(self, row: tuple[Any, ...]) -> None:
        """Add a row."""
        self._newest.append(row)
        if len(self._newest) == self.BLOCK:
            self._packed.append(zlib.compress(pickle.dumps(self._newest, 5), 1))
            self._newest = []

    def __len__(self) -> int:
        return len(self._packed) * self.BLOCK + len(self._newest)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        block, at = divmod(range(len(self))[place], self.BLOCK)
        if block == len(self._packed):
            return self._newest[at]
        if self._open[0] != block:
            self._open = block, pickle.loads(zlib.decompress(self._packed[block]))
        return self._open[1][at]


class Manifest(Sequence[Sample]):
    """The samples of a manifest, each made when it is asked for: a hundred thousand of them take a few megabytes.

    Args:
        path: the manifest; its pictures' paths are relative to its folder.
        seed: from which samples without a seed draw their own.

    Raises:
        ValueError: as :func:`read_manifest`.
    """

    def __init__(self, path: Path, seed: int = 0):
        self.path, self.seed = path, seed
        self._folder = str(path if path.is_dir() else path.parent)
        self.columns: set[str] = set()  # that some sample fills
        self._rows = Rows()  # cells in the order of COLUMNS; None: empty
        self._embedded = False  # whether some cell is a picture itself
        ids: set[str] = set()
        for where, row in rows_of(path):
            cells = _cells(row, f"{path}, {where}")
            name = cells.get("id") or f"row-{len(self._rows) + 1:05d}"
            if name in ids:
                raise ValueError(f"{path}, {where}: id {name!r} is that of {self._place_of(name)} already")
            ids.add(name)
            self.columns |= cells.keys()
            self._embedded |= any(isinstance(value, Embedded) for value in cells.values())
            self._rows.append(tuple(map(cells.get, COLUMNS)))
        if not self._rows:
            raise ValueError(f"{path} has no samples")
        if "reference" not in self.columns:
            raise ValueError(f"{path} has no column reference; there are {', '.join(COLUMNS)}")

    def _place_of(self, name: str) -> str:
        """Return where the sample of this id stands in the file."""
        count = next(i for i in range(len(self)) if (self._rows[i][0] or f"row-{i + 1:05d}") == name)
        return next(itertools.islice(rows_of(self.path), count, None))[0]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        cells = {name: value for name, value in zip(COLUMNS, self._rows[place], strict=True) if value is not None}
        name = cells.get("id") or f"row-{place % len(self) + 1:05d}"
        own = int(cells["seed"]) if "seed" in cells else derived_seed(self.seed, name)
        named = {c: v.name if isinstance(v, Embedded) else v for c, v in cells.items()} if self._embedded else cells
        return Sample(
            id=name,
            seed=own,
            files=Files(self._folder, cells),
            texts={c: cells[c] for c in TEXTS if c in cells},
            box=_box(cells["box"], name) if "box" in cells else None,
            digest=hashlib.sha256(ROW.encode([named, own]).encode()).hexdigest()[:16],
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[place] for place in range(len(self)))

    def part(self, places: Sequence[int]) -> Sequence[Sample]:
        """Return some of the samples, in this order; made when they are asked for, too."""
        return Part(self, places)


@dataclass(frozen=True)
class Part(Sequence[Sample]):
    """Some of a manifest's samples."""

    whole: Manifest
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self.whole[i] for i in self.places[place]]
        return self.whole[self.places[place]]


def read_manifest(path: Path, seed: int = 0) -> Manifest:
    """Read a manifest: CSV with a header, JSON lines, Parquet, a folder that ``datasets`` saved, or WebDataset shards.

    Columns: ``reference``, and as the pipeline needs them ``image``, ``mask``, ``control_image``, ``prompt``,
    ``negative_prompt``; ``reference_mask`` and ``box`` ("top left bottom right") for the scores; ``id`` (a file name;
    the row's number where there is none) and ``seed`` (drawn from ``seed`` and the id where there is none, so that it
    depends neither on order nor on other rows). Empty cells are as if they were not there.

    Raises:
        ValueError: not such a file; unknown, unnamed or repeated columns, or none of references; an id or a seed that
            is none, or an id twice. Names the line.
    """
    return Manifest(Path(path), seed)


def _cells(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the filled cells of a row, each of its type.

    Raises:
        ValueError: one is not; names it.
    """
    if not row.keys() <= set(COLUMNS):
        unknown = ", ".join(map(str, sorted(row.keys() - set(COLUMNS), key=str)))
        raise ValueError(f"{where}: no such column as {unknown}; there are {', '.join(COLUMNS)}")
    cells = {name: value for name, value in row.items() if not _empty(value)}
    if "id" in cells:
        cells["id"] = _id(cells["id"], where)
    for column in (*FILES, *TEXTS):
        value = cells.get(column, "")
        if not isinstance(value, str) and not (column in FILES and isinstance(value, Embedded)):
            raise ValueError(f"{where}: {column} is {_short(value)}, not a text")
    if "seed" in cells:
        cells["seed"] = _seed(cells["seed"], where)
    if "box" in cells:
        _box(cells["box"], where)
    return cells


def _empty(value: Any) -> bool:
    """Return whether a cell holds nothing; tables write NaN there."""
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))


def _id(value: Any, where: str) -> str:
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if not ID.fullmatch(name):
        raise ValueError(f"{where}: id {_short(value)} is no file name of letters, digits, - . and _")
    if len(name.encode()) > LONGEST_ID:
        raise ValueError(f"{where}: id {_short(value)} has more than {LONGEST_ID} bytes")
    return name


def derived_seed(seed: int, name: str) -> int:
    """Return a sample's own seed, from a run's and its id."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def _seed(value: Any, where: str) -> str:
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value)  # tables: 7.0 beside NaN
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
        raise ValueError(f"{where}: seed {_short(value)} is not a whole number from 0 to 2^63 - 1")
    return text


def _box(value: Any, where: str) -> Box:
    parts = value if isinstance(value, list) else str(value).split()
    if len(parts) != 4 or not all(re.fullmatch(r"[0-9]{1,9}", str(p)) for p in parts):
        raise ValueError(f"{where}: box {_short(value)} is not four pixels: top left bottom right")
    box = Box(*map(int, parts))
    if box.top >= box.bottom or box.left >= box.right:
        raise ValueError(f"{where}: box {_short(value)} is empty")
    return box


def _short(value: Any) -> str:
    """Return a value as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
