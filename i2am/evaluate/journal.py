"""Finished samples, appended: one file a process, one line a record. What a kill leaves half-written is no line yet.

A journal's first line says who wrote it, with which versions, and under which settings; every other line is a record.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from i2am._files import sync, write_atomically
from i2am.evaluate.identity import known_stamps

SUFFIX = ".jsonl"


class Entry(NamedTuple):
    """Place of a sample's record, and what there is to know of it without reading it."""

    file: str
    offset: int
    ok: bool
    digest: str  # of the manifest's row
    finished: float  # seconds since the epoch
    stamps: int  # of its pictures; see :func:`i2am.evaluate.identity.known_stamps`

    def replaces(self, other: Entry | None) -> bool:
        """Return whether this record counts rather than another of the same sample."""
        if other is None:
            return True
        if self.digest == other.digest:  # done twice: a good one stays
            return not other.ok and (self.ok or self.finished >= other.finished)
        return self.finished >= other.finished


class Entries(MutableMapping[str, Entry]):
    """Entries by sample, packed: with its id, about 200 bytes each."""

    FIELDS = struct.Struct("<IQ?dq")

    def __init__(self) -> None:
        self._packed: dict[str, bytes] = {}
        self._files: dict[str, int] = {}  # name → number
        self._names: list[str] = []

    def __getitem__(self, sample: str) -> Entry:
        packed = self._packed[sample]
        file, offset, ok, finished, stamps = self.FIELDS.unpack_from(packed)
        digest = packed[self.FIELDS.size :].decode("utf-8", "surrogatepass")
        return Entry(self._names[file], offset, ok, digest, finished, stamps)

    def get(self, sample: str, otherwise: Any = None) -> Any:
        """Return a sample's entry; ``otherwise`` where there is none."""
        return self[sample] if sample in self._packed else otherwise

    def __setitem__(self, sample: str, entry: Entry) -> None:
        if entry.file not in self._files:
            self._files[entry.file] = len(self._names)
            self._names.append(entry.file)
        fields = self.FIELDS.pack(self._files[entry.file], entry.offset, entry.ok, entry.finished, entry.stamps)
        self._packed[sample] = fields + entry.digest.encode("utf-8", "surrogatepass")

    def __delitem__(self, sample: str) -> None:
        del self._packed[sample]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


class Writer:
    """One process's journal, made with its first record."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path, self.header = path, header
        self._handle: int | None = None
        self._size = 0

    def append(self, record: dict[str, Any]) -> None:
        """Write a record to the disk: whole, or not at all."""
        if self._handle is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            sync(self.path.parent)
        line = b"" if self._size else _line({"journal": self.header})
        line += _line(record)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
                os.lseek(self._handle, self._size, os.SEEK_SET)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Journals:
    """The records of all processes in one folder, read once each and then only where something was added."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity
        self.entries = Entries()  # sample → its record
        self.headers: dict[str, dict[str, Any]] = {}  # file → header; of those that count
        self.seen = 0  # records, those that count no longer too
        self._read: dict[str, int] = {}  # file → bytes read

    def refresh(self) -> None:
        """Take in what was appended since the last time."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as files:
            grown = [f.name for f in files if f.name.endswith(SUFFIX) and f.stat().st_size > self._read.get(f.name, 0)]
            for name in sorted(grown):
                self._take_in(name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[Entry], dict[str, Any]]]:
        """Yield a function that reads the record of an entry, with the versions that made it; files stay open."""
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}

            def read(entry: Entry) -> dict[str, Any]:
                if entry.file not in files:
                    files[entry.file] = stack.enter_context(open(self.folder / entry.file, "rb"))
                files[entry.file].seek(entry.offset)
                return {**json.loads(files[entry.file].readline()), **_shown(self.headers[entry.file])}

            yield read

    def forget(self, samples: set[str]) -> None:
        """Rewrite the journals without some samples. Nobody else may be writing."""
        for file in sorted(self.folder.glob(f"*{SUFFIX}")):
            lines = file.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and _id(line) not in samples]
            if len(kept) < len(lines):
                write_atomically(file, lambda path, lines=kept: path.write_bytes(b"".join(lines)))
        self.entries, self.headers, self._read = Entries(), {}, {}
        self.refresh()

    def _take_in(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), open(self.folder / name, "rb") as file:
            offset = self._read.get(name, 0)
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written, or cut off by a kill
                    break
                self._take_line(name, offset, line)
                offset += len(line)
            self._read[name] = offset

    def _take_line(self, name: str, offset: int, line: bytes) -> None:
        try:
            found = json.loads(line.decode())
            if offset == 0:
                if found["journal"].get("identity") == self.identity:
                    self.headers[name] = found["journal"]
                return
            if name not in self.headers:  # of other settings
                return
            if not isinstance(found["id"], str):
                return
            stamps = known_stamps(found.get("pictures", {}))
            entry = Entry(name, offset, found.get("status") == "ok", found["digest"], found["finished"], stamps)
            if entry.replaces(self.entries.get(found["id"])):
                self.entries[found["id"]] = entry
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, struct.error):
            return  # a disk that lost power
        self.seen += 1


def _line(value: dict[str, Any]) -> bytes:
    """Return one line of ASCII: odd characters, undecodable ones too, are written as escapes."""
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


def _id(line: bytes) -> str | None:
    try:
        found = json.loads(line)["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _shown(header: dict[str, Any]) -> dict[str, Any]:
    return {"versions": header.get("versions", {}), "device": header.get("device", "")}
