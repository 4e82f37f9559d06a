"""What a result was made from: weight files, pictures, settings. Results of two such are never one table."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from i2am.evaluate.manifest import Files, Sample
from i2am.evaluate.sources import Embedded, Picture

SMALL = 1 << 20  # bytes up to which a file's contents are hashed
SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),  # weights
    *(".json", ".txt", ".model", ".tiktoken", ".vocab", ".spm", ".jinja", ".yaml", ".yml"),  # configs, vocabularies
)


def weights_identity(path: Path) -> dict[str, list[Any]]:
    """Identify what a folder (or file) of weights holds: ``{relative path: [bytes, what else]}``.

    Small files (indices, configs) count by their contents, a hub cache's blobs by the hash that they are named by,
    others by the time of their last change.
    """
    files = [path] if path.is_file() else sorted(_files(path, ()))
    root = path.parent if path.is_file() else path
    return {str(file.relative_to(root)): _file_identity(file) for file in files}


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files below a folder that count; a link back to one of the folders ``above`` is not followed."""
    real = folder.resolve()
    if real in above:
        return
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:  # what cannot be read, diffusers cannot load either
        return
    for path in paths:
        if path.is_dir():
            yield from _files(path, (*above, real))
        elif path.name.endswith(SUFFIXES):
            yield path


def _file_identity(file: Path) -> list[Any]:
    target = file.resolve()
    try:
        status = target.stat()
    except OSError:  # a link to nowhere: if it is needed, loading says so
        return [0, "unreadable"]
    if target.parent.name == "blobs":  # of a hub cache: named by its hash
        return [status.st_size, target.name]
    if status.st_size <= SMALL:
        return [status.st_size, digest(target.read_bytes())]
    return [status.st_size, status.st_mtime_ns]


def digest(contents: bytes) -> str:
    """Return a short hash of some bytes."""
    return hashlib.sha256(contents).hexdigest()[:16]


def difference(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str] = ()) -> str | None:
    """Name the first thing in which two settings differ, with both values; None where nothing does."""
    for name in sorted({*before, *now} - {*ignored}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "weights":
            return _weights_difference(old or {}, new or {})
        return f"{name}: {old!r}, now {new!r}"
    return None


def _weights_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the first file in which two sets of weights differ: ``{"pipeline": {file: …}, "ip_adapter": …}``."""
    for part in sorted({*before, *now}):
        old, new = before.get(part), now.get(part)
        if old == new:
            continue
        if not old or not new:
            return f"weights of the {part}: {'none' if not old else 'given'}, now {'none' if not new else 'given'}"
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        name, more = changed[0], f" and {len(changed) - 1} files more" if len(changed) > 1 else ""
        if name not in old or name not in new:
            how = f"is {'new' if name not in old else 'gone'}"
        elif old[name][0] != new[name][0]:
            how = f"had {old[name][0]} bytes, now {new[name][0]}"
        else:
            how = "has changed since"
        return f"weights of the {part}: {name} {how}{more}"
    return "weights"


# ------------------------------------------------------------------------------------------------------------- pictures


def pictures_identity(sample: Sample) -> dict[str, list[Any] | None]:
    """Identify a sample's pictures: ``{column: [bytes, time of the last change, hash of the contents]}``.

    None stands for one that cannot be read; whoever needs it will say so.
    """
    return {name: _picture_identity(picture) for name, picture in sample.files.items()}


def _picture_identity(picture: Picture) -> list[Any] | None:
    try:
        return [*stamp(picture), digest(picture.read_bytes())]
    except (OSError, ValueError):
        return None


def stale_picture(sample: Sample, known: Mapping[str, Any]) -> str | None:
    """Name a sample's picture that is not what it was when the sample was done; None where all are.

    Contents are read only where size or time differ: copying a dataset changes nothing.
    """
    for name, picture in sample.files.items():
        was = known.get(name)
        try:
            if was is not None and stamp(picture) == was[:2]:
                continue
        except (OSError, ValueError):
            pass  # said below
        now = _picture_identity(picture)
        if was is None and now is None:
            continue
        if was is None or now is None:
            return f"{name} {picture} could {'' if now is None else 'not '}be read then"
        if now[2] != was[2]:
            return f"{name} {picture} has changed since"
    return None


def stamps_now(files: Mapping[str, Picture]) -> int:
    """Return one number for the sizes and times of a sample's pictures, as their files are now; see `known_stamps`."""
    found = []
    for name in sorted(files):
        picture = files.place(name) if isinstance(files, Files) else files[name]
        try:
            found += [name, *stamp(picture)]
        except (OSError, ValueError):
            return 0
    return hash(tuple(found))


def known_stamps(pictures: Mapping[str, Any]) -> int:
    """Return the same number of a record's pictures; 0, as there, where one could not be read.

    It holds within this process. Where the two differ, :func:`stale_picture` says what has changed, if anything.
    """
    found = []
    for name in sorted(pictures):
        if pictures[name] is None:
            return 0
        found += [name, *pictures[name][:2]]
    return hash(tuple(found))


def stamp(picture: Picture | str) -> list[int]:
    """Return ``[bytes, time of the last change]`` of a picture's file, or of the shard or table that holds it."""
    status = os.stat(picture.container if isinstance(picture, Embedded) else picture)
    return [status.st_size, status.st_mtime_ns]
