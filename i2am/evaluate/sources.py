"""Where a manifest's rows come from: text files, tables, and shards that hold the pictures themselves."""

from __future__ import annotations

import csv
import functools
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
Row: TypeAlias = "tuple[str, dict[str, Any]]"  # ("line 3", {column: cell})


@dataclass(frozen=True)
class Embedded:
    """A picture inside a shard or a table.

    Attributes:
        container: the file (or folder) that holds it.
        name: where in it, for messages and for the row's digest.
        read: gives its bytes; takes the container.
    """

    container: Path
    name: str
    read: Callable[[Path], bytes] = field(compare=False, repr=False)

    def read_bytes(self) -> bytes:
        """Return its bytes, as they are stored."""
        return self.read(self.container)

    def __str__(self) -> str:
        return f"{self.container}: {self.name}"


Picture: TypeAlias = "Path | Embedded"


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the rows of a manifest: ``(where, {column: cell})``; a cell is a text, a number, a list or a picture.

    Raises:
        ValueError: there is none, of a kind that is none, or it cannot be read. Names the file and the line.
    """
    reader = _reader(path)
    try:
        yield from reader(path)
    except FileNotFoundError:
        raise ValueError(f"there is no manifest {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".jsonl", ".parquet", ".tar"):
        return {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".tar": _shard_rows}[suffix]
    if path.is_dir() and (path / "state.json").is_file():
        return _dataset_rows
    if path.is_dir() and any(path.glob("*.tar")):
        return _shard_rows
    raise ValueError(
        f"{path} is neither .csv nor .jsonl nor .parquet, nor a folder of datasets or of WebDataset shards (.tar)"
    )


# ------------------------------------------------------------------------------------------------------- text files


def _csv_rows(path: Path) -> Iterator[Row]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)  # a quoted cell may hold lines
        try:
            header = next(reader, [])
            _check_header(path, header)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{path}, line {reader.line_num}: it has not as many cells as the header")
                yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _check_header(path: Path, header: list[str]) -> None:
    """Refuse a header with columns that are unnamed, twice there, or not parted by commas."""
    for other in (";", "\t", "|"):
        if len(header) == 1 and other in header[0]:
            raise ValueError(f"{path}, line 1: columns are separated by {other!r}; a comma is needed")
    if "" in header:
        raise ValueError(f"{path}, line 1: column {header.index('') + 1} has no name")
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}, line 1: column {repeated[0]!r} is there {header.count(repeated[0])} times")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with open(path, newline="\n", encoding="utf-8-sig") as file:  # JSON may hold U+2028, which ends no line
        for line, content in enumerate(file, 1):
            if content.strip():
                yield f"line {line}", read_object(content, f"{path}, line {line}")


def read_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Read an object of a JSON text.

    Raises:
        ValueError: it is not JSON, not an object, has a name twice, or is nested too deeply.
    """
    try:
        found = json.loads(text, object_pairs_hook=functools.partial(_unique, where))
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: not an object with names and values")
    return found


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{where}: {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


# ----------------------------------------------------------------------------------------------------------- tables


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: Parquet needs pyarrow: pip install "i2am[evaluate]"') from None
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        pictures = {f.name for f in table.schema_arrow if _holds_bytes(f.type)}
        texts = [name for name in table.schema_arrow.names if name not in pictures]
        for group in range(table.num_row_groups):
            for place, row in enumerate(table.read_row_group(group, columns=texts).to_pylist()):
                cells = {n: _cell(path, group, place, n) for n in pictures}
                yield f"row {place + 1} of group {group + 1}", row | cells
            if not texts:
                raise ValueError(f"{path} has pictures only: a column id, seed or prompt is needed beside them")
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _holds_bytes(kind: Any) -> bool:
    """Return whether a column holds files: binary, or ``datasets``' struct of bytes and path."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return "bytes" in [f.name for f in kind]
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _cell(path: Path, group: int, place: int, column: str) -> Embedded:
    return Embedded(path, f"{column} {group}:{place}", functools.partial(_read_cell, group, place, column))


def _read_cell(group: int, place: int, column: str, path: Path) -> bytes:
    value = _column(path, path.stat().st_mtime_ns, group, column)[place].as_py()
    if isinstance(value, dict):
        value = _bytes_of(value, path.parent)
    if value is None:
        raise OSError(f"{path}: {column} of row {place + 1} of group {group + 1} is empty")
    return bytes(value)


@functools.lru_cache(maxsize=4)
def _column(path: Path, changed: int, group: int, column: str) -> Any:
    """Read one column of one row group: the last few are kept."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)


def _dataset_rows(path: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: a folder of datasets needs the package: pip install datasets") from None
    try:
        found = datasets.load_from_disk(str(path))
        pictures = [name for name, kind in found.features.items() if isinstance(kind, datasets.Image)]
        texts = found.remove_columns(pictures)
        for place in range(len(found)):
            cells = {n: Embedded(path, f"{n} {place}", functools.partial(_read_example, n, place)) for n in pictures}
            yield f"example {place + 1}", (texts[place] if texts.column_names else {}) | cells
    except Exception as error:  # of a damaged one the package raises whatever it stumbles on
        raise ValueError(f"{path} cannot be read as a dataset: {type(error).__name__}: {error}") from error


def _read_example(column: str, place: int, path: Path) -> bytes:
    value = _dataset(path, column)[place][column]
    contents = None if value is None else _bytes_of(value, Path())
    if contents is None:
        raise OSError(f"{path}: {column} of example {place + 1} is empty")
    return contents


def _bytes_of(value: dict[str, Any], folder: Path) -> bytes | None:
    """Return a picture as ``datasets`` has it, its bytes or else its file's; None where it has neither."""
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    path = value.get("path")
    return (folder / path).read_bytes() if isinstance(path, str) and path else None


@functools.lru_cache(maxsize=8)
def _dataset(path: Path, column: str) -> Any:
    import datasets

    return datasets.load_from_disk(str(path)).select_columns([column]).cast_column(column, datasets.Image(decode=False))


# ----------------------------------------------------------------------------------------------------------- shards


def _shard_rows(path: Path) -> Iterator[Row]:
    """Yield the samples of WebDataset shards: ``KEY.reference.png``, ``KEY.prompt.txt``, ``KEY.json`` with the rest."""
    for shard in [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")):
        key, cells = "", {}
        try:
            with tarfile.open(shard, "r:") as members:
                for member in members:
                    if not member.isfile():
                        continue
                    name, _, extension = Path(member.name).name.partition(".")
                    if name != key and cells:
                        yield f"{shard.name}: {key}", {"id": key, **cells}
                        cells = {}
                    key = name
                    cells |= _member_cells(shard, members, member, extension)
        except tarfile.TarError as error:
            raise ValueError(f"{shard} cannot be read as a shard: {error}") from error
        if cells:
            yield f"{shard.name}: {key}", {"id": key, **cells}


def _member_cells(shard: Path, members: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> dict[str, Any]:
    """Return the cells that one file of a shard fills."""
    column, _, kind = extension.rpartition(".")
    if f".{kind.lower()}" in PICTURE_SUFFIXES:
        read = functools.partial(_read_member, member.offset_data, member.size)
        return {column or "reference": Embedded(shard, member.name, read)}
    if member.size > csv.field_size_limit() or kind not in ("json", "txt"):
        raise ValueError(f"{shard}: {member.name} is neither a picture nor a short .json or .txt")
    file = members.extractfile(member)
    text = file.read().decode() if file is not None else ""
    return read_object(text, f"{shard}: {member.name}") if kind == "json" else {column or "prompt": text}


def _read_member(start: int, size: int, shard: Path) -> bytes:
    with open(shard, "rb") as file:
        file.seek(start)
        contents = file.read(size)
    if len(contents) < size:
        raise OSError(f"{shard} is truncated")
    return contents
