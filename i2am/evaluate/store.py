"""A folder of results. A sample is finished when its record is written, whole; all its other files are written before.

::

    DIR/i2am.json                settings, weights and versions
    DIR/samples/*.jsonl          records, appended: scores, or what went wrong; one file a process
    DIR/levels/ID.safetensors    a sample's maps at every level, small: what `i2am compare` reads
    DIR/previews/ID.jpg          its images with their maps
    DIR/images, DIR/maps         on request: generated images, all sums
    DIR/running                  which processes work here, and on what
    DIR/results.csv, summary.json, contact.png        made from the above at the end
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from i2am._files import UNFINISHED, abandoned, machine, runs, unfinished_path, write_atomically
from i2am.evaluate.identity import difference, stale_picture, stamps_now
from i2am.evaluate.journal import Entry, Journals, Writer
from i2am.evaluate.leases import Lease, Owner, owners
from i2am.evaluate.manifest import Sample

SETTINGS = "i2am.json"
RUNNING = "running"
FOLDERS = ("samples", "levels", "previews", "images", "maps")
TABLES = ("results.csv", "results.parquet", "summary.json", "contact.png")
NOT_COMPARED = ("versions", "pipeline", "manifest", "ip_adapter", "lora")  # paths: their files are in "weights"
AGAIN = "name a new folder, or restart (--restart) to do these anew"


class StoreError(OSError):
    """Results cannot be written; what is finished is kept."""


class Store:
    """The results in one folder, which any number of processes may share.

    Args:
        out: the folder.
        launch: of several processes started as one: "host:port/rank".
    """

    def __init__(self, out: str | os.PathLike[str], launch: str = ""):
        self.out = Path(out)
        self._launch = launch
        self._lease: Lease | None = None
        self._journals: Journals | None = None
        self._writer: Writer | None = None
        self._to_retry: dict[str, Entry] = {}

    def open(self, settings: dict[str, Any], *, restart: bool = False) -> None:
        """Make the folder, or go on with one of the same settings; several processes may.

        Args:
            settings: JSON values, ``command`` and ``versions`` among them; all but versions and paths are compared with
                those that results are there of.
            restart: forget results of other settings.

        Raises:
            ValueError: it holds something else, or results of other settings; says which. Or another process works
                there, whose results are to be forgotten.
            OSError: it cannot be written.
        """
        settings = json.loads(json.dumps(settings))
        path = self.out / SETTINGS
        if not path.exists() and self.out.exists() and any(map(_foreign, self.out.iterdir())):
            raise ValueError(f"{self.out} is not empty and has no {SETTINGS} of an evaluation: name a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self.close()
        self._lease = Lease(self.out / RUNNING, self._launch)
        weakref.finalize(self, self._lease.end)
        try:
            _write_once(path, json.dumps(settings, indent=2, ensure_ascii=True))
            if not restart and any((self.out / "samples").glob("*.json")):
                raise ValueError(f"{self.out} has results of i2am 0.1, which this version does not go on with: {AGAIN}")
            what = difference(self.settings(), settings, NOT_COMPARED)
            if what is not None:
                if not restart:
                    raise ValueError(f"{self.out} has results of other settings ({what}): {AGAIN}")
                self._clear()
                write_atomically(path, lambda p: p.write_text(json.dumps(settings, indent=2), encoding="utf-8"))
        except BaseException:
            self.close()
            raise
        self._tidy()
        identity = _identity(settings)
        self._journals = Journals(self.out / "samples", identity)
        header = {"identity": identity, "versions": settings.get("versions", {}), "device": settings.get("device", "")}
        self._writer = Writer(self.out / "samples" / f"{Path(self._lease.owner.name).stem}.jsonl", header)

    def close(self) -> None:
        """Leave the folder to others."""
        if self._writer is not None:
            self._writer.close()
        if self._lease is not None:
            self._lease.end()
        self._lease = self._writer = None

    def settings(self) -> dict[str, Any]:
        """Return settings and versions.

        Raises:
            ValueError: this is not a folder of results.
        """
        try:
            settings = json.loads((self.out / SETTINGS).read_text(encoding="utf-8"))
            if settings["command"] != "evaluate":
                raise ValueError(f"written by i2am {settings['command']}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.out} is not a folder of `i2am evaluate`: {error}") from error
        return settings

    @property
    def identity(self) -> str:
        """Return a digest of all settings that are compared."""
        return _identity(self.settings())

    @property
    def process(self) -> str:
        """Return a name of this process that no other one of the folder has had."""
        return Path(self._leased().owner.name).stem

    def path(self, folder: str, sample_id: str, suffix: str) -> Path:
        """Return the path of a sample's file."""
        return self.out / folder / (sample_id + suffix)

    def write(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Write a file at once or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write)
        except OSError as error:
            raise StoreError(error.errno, error.strerror or str(error), str(path)) from error

    # ------------------------------------------------------------------------------------------------ sharing samples

    def pending(self, samples: Sequence[Sample], *, restart: bool = False) -> list[int]:
        """Return the places of the samples without a good record; those that a living process has just failed at count
        as done.

        Args:
            samples: the manifest's.
            restart: forget records whose pictures have changed since.

        Raises:
            ValueError: a picture has changed since a sample was done; names both.
        """
        self.refresh()
        journals, left, stale = self._opened(), [], {}
        if not journals.entries:
            return list(range(len(samples)))
        others = {f"{Path(o.name).stem}.jsonl" for o in self.others()}
        with journals.reading() as read:
            for place, sample in enumerate(samples):
                entry = journals.entries.get(sample.id)
                if entry is None or entry.digest != sample.digest or (not entry.ok and entry.file not in others):
                    left.append(place)
                elif not entry.ok or stamps_now(sample.files) == entry.stamps != 0:
                    continue
                elif (what := stale_picture(sample, read(entry).get("pictures", {}))) is not None:
                    stale[sample.id] = what
                    left.append(place)
        if stale:
            name, what = next(iter(stale.items()))
            more = f", and {len(stale) - 1} samples more" if len(stale) > 1 else ""
            if not restart:
                raise ValueError(f"{self.out} has results of other pictures ({name}: {what}{more}): {AGAIN}")
            self._refuse_company()
            journals.forget(set(stale))
        return left

    def start(self) -> None:
        """Note which samples have failed until now: they may be claimed once more."""
        self.refresh()
        self._to_retry = {name: entry for name, entry in self._opened().entries.items() if not entry.ok}

    def claim(self, sample: Sample) -> bool:
        """Take a sample, unless a process works on it or has done it meanwhile."""
        lease = self._leased()
        if not lease.claim(sample.id):
            return False
        self.refresh()
        if not self.attempted(sample):
            return True
        lease.release(sample.id)
        return False

    def release(self, sample: Sample) -> None:
        """Give a sample back, finished or not."""
        self._leased().release(sample.id)

    def attempted(self, sample: Sample) -> bool:
        """Return whether a sample has a record since ``start``, good or not, as far as the last look."""
        entry = self._opened().entries.get(sample.id)
        return entry is not None and entry.digest == sample.digest and entry != self._to_retry.get(sample.id)

    def others(self) -> list[Owner]:
        """Return other processes that work in this folder."""
        return self._leased().others()

    def visitors(self) -> list[Owner]:
        """Return everyone who has signed in, as seen from outside; some may have died on another machine."""
        return [o for o in owners(self.out / RUNNING) if o.machine != machine() or runs(o.pid, o.started)]

    # -------------------------------------------------------------------------------------------------------- records

    def finish(self, record: dict[str, Any]) -> None:
        """Keep a sample's record: from now on it is finished.

        Raises:
            StoreError: it cannot be written.
        """
        self._leased()
        try:
            self._writer.append({"finished": round(time.time(), 3), **record})
        except OSError as error:
            raise StoreError(error.errno, error.strerror or str(error), str(self._writer.path)) from error

    def refresh(self) -> int:
        """Take in what any process has finished; return how many records have been seen so far."""
        self._opened().refresh()
        return self._opened().seen

    def record(self, sample: Sample) -> dict[str, Any] | None:
        """Return a finished sample's record; None where there is none of this very row, or none that is whole."""
        return next(self.records([sample]), None)

    def records(self, samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
        """Yield the records of those that are finished, in the samples' order, read one by one."""
        self.refresh()
        journals = self._opened()
        entries = ((journals.entries.get(s.id), s.digest) for s in samples)
        with journals.reading() as read:
            yield from (read(e) for e, digest in entries if e is not None and e.digest == digest)

    def all_records(self) -> Iterator[dict[str, Any]]:
        """Yield every record, whatever the manifest says today."""
        self.refresh()
        with self._opened().reading() as read:
            yield from map(read, self._opened().entries.values())

    def _opened(self) -> Journals:
        """Open the journals; of a folder that is only read, those of its own settings."""
        if self._journals is None:
            self._journals = Journals(self.out / "samples", _identity(self.settings()))
        return self._journals

    def _leased(self) -> Lease:
        if self._lease is None:
            raise RuntimeError("the store is not open: call store.open(settings) first")
        return self._lease

    # --------------------------------------------------------------------------------------------------------- opening

    def _refuse_company(self) -> None:
        others = self.others()
        if others:
            raise ValueError(f"{self.out} cannot be restarted: {others[0]} works in it")

    def _clear(self) -> None:
        """Remove every result, if nobody else works here."""
        self._refuse_company()
        for name in TABLES:
            (self.out / name).unlink(missing_ok=True)
        for name in FOLDERS:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.out / name)

    def _tidy(self) -> None:
        """Forget what killed processes of this machine left half-written."""
        for folder in (self.out, *(self.out / name for name in FOLDERS)):
            with suppress(FileNotFoundError), os.scandir(folder) as files:
                for name in [f.name for f in files if f.name.startswith(".i2am-")]:
                    if abandoned(folder / name):
                        (folder / name).unlink(missing_ok=True)


def _foreign(path: Path) -> bool:
    return path.name != RUNNING and UNFINISHED.fullmatch(path.name) is None


def _identity(settings: dict[str, Any]) -> str:
    """Return a digest of all settings that are compared."""
    compared = {k: v for k, v in settings.items() if k not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]


def _write_once(path: Path, text: str) -> None:
    """Write a file unless it is there; of several processes that try at once, one does, and no one sees half of it."""
    if path.exists():
        return
    unfinished = unfinished_path(path.parent)
    try:
        unfinished.write_text(text, encoding="utf-8")
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links: the last of several wins, with the same text
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
