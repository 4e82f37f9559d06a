"""The maps file, ``i2am-maps-1``: safetensors with a header that names every field. docs/maps-format.md describes it.

Written here field by field, so that no attribute can be renamed into the format; read here once, so that what
:func:`read_maps` returns needs no further check.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am._files import read_unchanged, write_atomically
from i2am.maps.aggregate import STORED, LayerSums, check_sums
from i2am.maps.entries import STAMP, QKEntry, check_stamp, pack, stamp_of
from i2am.maps.frames import ALONG, PICTURE, Video, check_video
from i2am.maps.header import Field, shown
from i2am.maps.placed import Tile
from i2am.maps.provenance import plain
from i2am.references import KINDS, Grid, Kind

FORMAT = "i2am-maps-1"
VERSION = 2  # of the header; 1 (or no "version"): what i2am 0.1 wrote, without provenance
RECORD = "record."  # prefix of embedded tensors of a record
QK_TENSORS = ("q", "k", "row_lse", "col_lse")  # and perhaps "mask"

logger = logging.getLogger("i2am")


class Contents(NamedTuple):
    """Contents of a maps file."""

    sums: list[LayerSums]
    canvas: Grid | None
    regions: list[str]
    entries: list[QKEntry]
    provenance: dict[str, Any]
    video: Video = PICTURE


# ---------------------------------------------------------------------------------------------------------- writing


def write_maps(path: Path, contents: Contents, embed: bool = False) -> None:
    """Write a maps file at once or not at all.

    Args:
        path: of the file.
        contents: its record goes into the file where it lies in memory; one on disk stays where it is and is named by
            its path relative to the file, unless ``embed``.
        embed: copy a record on disk into the file.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for i, s in enumerate(contents.sums):
        tensors |= {f"{i}.{name}": x for name in STORED if (x := getattr(s, name)) is not None}
    record_tensors, record, stamp = _pack_record(contents.entries, path, embed)
    header = {
        "version": VERSION,
        "provenance": contents.provenance,
        "canvas": None if contents.canvas is None else list(contents.canvas),
        "regions": contents.regions,
        "layers": [_layer_header(s) for s in contents.sums],
        "record": record,
    }
    if contents.video != PICTURE:
        header["video"] = contents.video._asdict()
    tensors = {name: x.contiguous() for name, x in (tensors | record_tensors).items()}
    metadata = {"format": FORMAT, "maps": json.dumps(header)} | ({} if stamp is None else {STAMP: stamp})
    write_atomically(path, lambda unfinished: save_file(tensors, unfinished, metadata=metadata))


def _layer_header(s: LayerSums) -> dict[str, Any]:
    return {
        "layer": s.layer,
        "reference": s.reference,
        "grid": list(s.grid),
        "reference_grid": None if s.reference_grid is None else list(s.reference_grid),
        "skip": s.skip,
        "keys": s.keys,
        "default": s.default,
        "counts": list(s.counts),
        **({} if s.kind == "reference" else {"kind": s.kind}),
        **({} if s.queries is None else {"queries": s.queries}),
    }


def _pack_record(
    entries: Sequence[QKEntry], path: Path, embed: bool
) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Return the embedded tensors of a record, its part of the header, and the stamp of what is embedded."""

    def embedded(e: QKEntry) -> bool:
        return embed or e.file is None or e.cut is not None or e.file.resolve() == path.resolve()

    read = [replace(e, tensors=e.read(), file=None, cut=None) if embedded(e) else e for e in entries]
    own = [e for e in read if e.file is None]
    contents, tensor_names = pack(own, RECORD)
    of_memory = iter(tensor_names)
    listing: list[list[Any]] = []
    files: dict[str, int] = {}
    stamps: dict[str, str] = {}
    for e in read:
        file = None
        if e.file is not None:
            file = Path(os.path.relpath(e.file.resolve(), path.resolve().parent)).as_posix()
            files[file] = e.file.stat().st_size
            stamps |= {} if e.stamp is None else {file: e.stamp}
        names = next(of_memory) if file is None else e.tensor_names
        tile = [] if e.tile is None else [[e.tile.top, e.tile.left, *e.tile.grid]]
        listing.append([e.layer, e.reference, e.group, e.scale, file, names, *tile])
    outside = next((name for name in files if name.startswith("../")), None)
    if outside is not None:
        logger.warning(
            "%s refers to its record outside its own folder (%s): AttributionMaps.load() takes that only with "
            "record_anywhere=True; save(embed=True) copies the record into the file",
            path,
            outside,
        )
    return contents, {"entries": listing, "files": files, "stamps": stamps}, stamp_of(own) if own else None


# ---------------------------------------------------------------------------------------------------------- reading


def read_maps(path: Path, record_anywhere: bool = False) -> Contents:
    """Read a maps file and check all of it; the tensors of its record stay on disk until a patch is asked.

    Args:
        path: of the file.
        record_anywhere: whether its record may lie outside the file's own folder.

    Raises:
        FileNotFoundError: there is no such file, or the record that it names has gone.
        ValueError: it, or its record, is truncated, malformed or not of this format; names the file and the field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no maps file at {path}")
    metadata, shapes, tensors = read_unchanged(path, _read_safetensors)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a maps file of i2am (format {shown(metadata.get('format'))})")
    try:
        header = Field(path, "header", json.loads(metadata.get("maps", "")))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its header is not JSON that can be read: {str(error) or 'nested too deeply'}"
        ) from None
    fields = header.fields(("layers", "canvas", "regions", "record"), ("version", "provenance", "video"))
    version = fields["version"].integer(1) if "version" in fields else 1
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer i2am (header version {version}, this one reads {VERSION})")
    sums = [_read_layer(layer, i, tensors) for i, layer in enumerate(fields["layers"].items(least=1))]
    known = {f"{i}.{name}" for i in range(len(sums)) for name in STORED}
    unknown = next((name for name in shapes if name not in known and not name.startswith(RECORD)), None)
    if unknown is not None:
        raise ValueError(f"{path}: tensor {shown(unknown)} belongs to no layer of the header")
    regions = [region.text() for region in fields["regions"].items()]
    if len(set(regions)) < len(regions):
        fields["regions"].refuse("must name each region once")
    video = _read_video(fields["video"]) if "video" in fields else PICTURE
    try:
        check_sums(sums, regions)
        check_video(video, sums)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Contents(
        sums=sums,
        canvas=fields["canvas"].grid() if fields["canvas"].value is not None else None,
        regions=regions,
        entries=_read_record(fields["record"], sums, shapes, metadata.get(STAMP), record_anywhere),
        provenance=_read_provenance(fields.get("provenance")),
        video=video,
    )


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Stored], dict[str, Tensor]]:
    """Return a file's metadata, the shape of every tensor, and those tensors that are not a record's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = _shapes(file)
            tensors = {name: file.get_tensor(name) for name in shapes if not name.startswith(RECORD)}
            return file.metadata() or {}, shapes, tensors
    except (SafetensorError, OSError, ValueError, UnicodeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


class Stored(NamedTuple):
    """Entry of a safetensors file about a tensor, without reading it."""

    shape: tuple[int, ...]
    dtype: str  # "F32", "BOOL", …


def _shapes(file: Any) -> dict[str, Stored]:
    """Return shape and dtype of every tensor of an open safetensors file."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {name: Stored(tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}


def _read_layer(layer: Field, i: int, tensors: dict[str, Tensor]) -> LayerSums:
    f = layer.fields(
        ("layer", "reference", "grid", "reference_grid", "skip", "keys", "default", "counts"), ("queries", "kind")
    )
    for name in ("r2g", "g2r"):
        if f"{i}.{name}" not in tensors:
            layer.refuse(f"has no tensor {i}.{name}")
    stored = {name: tensors[f"{i}.{name}"] for name in STORED if f"{i}.{name}" in tensors}
    for name, x in stored.items():
        if x.dtype not in (torch.float32, torch.float64):
            layer.refuse(f"has {i}.{name} of {x.dtype}, not float32")
    return LayerSums(
        layer=f["layer"].text(),
        reference=f["reference"].text(),
        grid=f["grid"].grid(),
        reference_grid=None if f["reference_grid"].value is None else f["reference_grid"].grid(),
        skip=f["skip"].integer(0),
        keys=f["keys"].integer(1),
        default=f["default"].flag(),
        counts=tuple(count.integer(0) for count in f["counts"].items(least=1)),
        queries=f["queries"].integer(1) if "queries" in f else None,
        kind=_read_kind(f["kind"]) if "kind" in f else "reference",
        r2g=stored["r2g"],
        g2r=stored["g2r"],
        mass=stored.get("mass"),
        sram=stored.get("sram"),
    )


def _read_kind(field: Field) -> Kind:
    kind = next((name for name in KINDS if name == field.text()), None)
    if kind is None:
        field.refuse(f"must be one of {', '.join(KINDS)}")
    return kind


def _read_video(field: Field) -> Video:
    f = field.fields(("frames", "along"), ("lead",))
    along = next((name for name in ALONG if name == f["along"].text()), None)
    if along is None:
        f["along"].refuse(f"must be one of {', '.join(ALONG)}")
    return Video(f["frames"].integer(1), along, f["lead"].integer(0) if "lead" in f else 0)


def _read_provenance(field: Field | None) -> dict[str, Any]:
    if field is None:
        return {}
    if not isinstance(field.value, dict):
        field.refuse("must be an object")
    try:
        return plain(field.value)
    except ValueError as error:
        raise ValueError(f"{field.file}: {field.name}: {error}") from None


# ----------------------------------------------------------------------------------------------------------- record


def _read_record(
    record: Field, sums: Sequence[LayerSums], embedded: dict[str, Stored], stamp: str | None, anywhere: bool
) -> list[QKEntry]:
    """Return the entries of a record, each checked against its layer and its file's own list of tensors."""
    from safetensors import SafetensorError, safe_open

    fields = record.fields(("entries", "files"), ("stamps",))
    stamps: dict[str | None, str | None] = {None: stamp}
    stamps |= {x.key: x.text() for x in fields["stamps"].mapping()} if "stamps" in fields else {}
    stored: dict[str | None, dict[str, Stored]] = {None: embedded}
    paths: dict[str | None, Path] = {None: record.file}
    for size in fields["files"].mapping():
        name = size.key
        paths[name] = _record_file(size, anywhere)
        try:
            with safe_open(paths[name], framework="pt") as file:
                check_stamp(paths[name], file.metadata(), stamps.get(name))
                stored[name] = _shapes(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{record.file}: the record {paths[name]} is damaged: {error}") from None
    layers = {(s.layer, s.reference): s for s in sums}
    entries = [_read_entry(entry, layers, stored, paths) for entry in fields["entries"].items()]
    known = {paths[name]: stamp for name, stamp in stamps.items() if name in paths}
    return [replace(e, stamp=None if e.file is None else known.get(e.file)) for e in entries]


def _read_entry(
    entry: Field,
    layers: dict[tuple[str, str], LayerSums],
    stored: dict[str | None, dict[str, Stored]],
    paths: dict[str | None, Path],
) -> QKEntry:
    placed = isinstance(entry.value, list) and len(entry.value) == 7
    layer, reference, group, scale, file, names, *tiles = entry.items(exactly=6 + placed)
    s = layers.get((layer.text(), reference.text()))
    if s is None:
        entry.refuse("is of a layer and reference that the header does not list")
    if group.integer(0) >= len(s.counts):
        group.refuse(f"must be one of {len(s.counts)} time groups")
    where = None if file.value is None else file.text()
    if where not in stored:
        file.refuse("is not one of record.files")
    tensor_names = {name.key: name.text() for name in names.mapping(QK_TENSORS, ("mask",))}
    missing = next((n for n in tensor_names.values() if n not in stored[where]), None)
    if missing is not None:
        names.refuse(f"refers to tensor {shown(missing)}, which {paths[where].name} does not have")
    shapes = {name: stored[where][n] for name, n in tensor_names.items()}
    tile = _read_tile(tiles[0], s) if tiles else None
    queries, keys = s.r2g.shape[-1], s.g2r.shape[-1]
    if tile is not None:
        queries, window = tile.grid[0] * tile.grid[1], keys == queries and shapes["k"].shape[2:3] != (keys,)
        keys = queries if window else keys  # the tile has a reference of its own
    _check_entry(names, shapes, s, queries, keys)
    entry_of = QKEntry(s.layer, s.reference, group.value, scale.number(), tile=tile)
    return replace(entry_of, file=paths[where], tensor_names=tensor_names)


def _read_tile(field: Field, s: LayerSums) -> Tile:
    """Return where an entry's queries lie on its layer's grid."""
    top, left, height, width = field.items(exactly=4)
    tile = Tile(top.number(), left.number(), (height.integer(1), width.integer(1)))
    if any(not 0 <= start < cells for start, cells in zip(tile[:2], s.grid, strict=True)):
        field.refuse(f"must begin on the layer's grid {s.grid}")
    return tile


def _check_entry(names: Field, found: dict[str, Stored], s: LayerSums, Q: int, K: int) -> None:
    """Refuse recorded tensors whose shapes are not those of their layer's sums, or of a tile of Q tokens."""
    (B, H), d = s.r2g.shape[1:3], found["q"].shape[-1] if found["q"].shape else 0
    expected = {"q": (B, H, Q, d), "k": (B, H, K, d), "row_lse": (B, H, Q), "col_lse": (B, H, K)}
    for name, shape in expected.items():
        if found[name].shape != shape or not d:
            names.refuse(f"has {name} of shape {list(found[name].shape)} where the layer's sums need {list(shape)}")
        if not found[name].dtype.startswith(("F", "BF")):
            names.refuse(f"has {name} of type {found[name].dtype}, not floating point")
    mask = found.get("mask")
    if mask is not None and (
        len(mask.shape) != 4 or any(n not in (1, most) for n, most in zip(mask.shape, (B, H, Q, K), strict=True))
    ):
        names.refuse(f"has a mask of shape {list(mask.shape)}, which does not broadcast to {[B, H, Q, K]}")


def _record_file(size: Field, anywhere: bool) -> Path:
    """Return the path of one file of a record: a regular one, whole, below the maps file's folder."""
    folder, name, refuse = size.file.parent, size.key, size.refuse
    pure, path = PurePosixPath(name.replace(os.sep, "/")), folder / name
    try:
        inside = not pure.is_absolute() and ".." not in pure.parts and path.resolve().is_relative_to(folder.resolve())
        status = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.stat()  # not exists(), which since Python 3.14 takes every failure for a no
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a NUL
        refuse(f"can't be looked up ({str(error)[:200]})")
    if not anywhere and not inside:
        refuse("lies outside the folder of the maps file; pass record_anywhere=True to read it all the same")
    if status is None:
        raise FileNotFoundError(f"{size.file} refers to the record {path}, which is not there")
    if not stat.S_ISREG(status.st_mode):
        refuse("is not a regular file")
    if status.st_size != size.integer(0):
        raise ValueError(
            f"{size.file}: the record {path} is truncated or another file: {status.st_size} bytes instead of "
            f"{size.value}"
        )
    return path
