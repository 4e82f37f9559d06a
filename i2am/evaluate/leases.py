"""Who works in a folder: a lease a process, and claims on samples. Any shared file system will do.

A lease is a file that its process touches every ``BEAT`` seconds. On its own machine a process counts as alive while
its pid runs (and started when it did); seen from another one, while its lease is fresher than ``PATIENCE`` by the clock
of the file system. A claim is a hard link to the lease: made at once or not at all, and it says whose it is. Where its
owner has died, the next generation of the claim (``ID~1``) is free to take; nobody removes what another one made.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from i2am._files import machine, runs, this_process

BEAT = 15.0  # seconds between two touches of a lease
PATIENCE = 300.0  # seconds without one, until a process of another machine counts as dead; shared folders cache for 60
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EACCES)


class Owner(NamedTuple):
    """Process that a lease belongs to."""

    name: str  # of the lease's file
    machine: str
    pid: int
    started: int
    launch: str = ""  # of several processes started as one: "host:port/rank"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.machine.rpartition('-')[0]}"


class Lease:
    """This process's place in a folder; a context manager that beats until it ends.

    Args:
        folder: where leases and claims lie; made where there is none.
        launch: see :class:`Owner`.
    """

    def __init__(self, folder: Path, launch: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        host, pid, started = this_process()
        self.folder = folder
        self.owner = Owner(f"{host}-{pid}-{uuid.uuid4().hex[:8]}.lease", host, pid, started, launch)
        self.path = folder / self.owner.name
        _write_new(self.path, json.dumps(self.owner._asdict()))
        self._held: dict[str, int] = {}  # sample → generation
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Give back every claim and the lease."""
        self._ended.set()
        for sample in list(self._held):
            self.release(sample)
        self.path.unlink(missing_ok=True)

    def claim(self, sample: str) -> bool:
        """Take a sample for this process, unless a living one has it."""
        for generation in itertools.count():
            path = self._claim_path(sample, generation)
            try:
                self._link(path)
            except FileExistsError:
                if self.holds(path):
                    return False
            else:
                self._held[sample] = generation
                return True
        raise AssertionError("unreachable")

    def release(self, sample: str) -> None:
        """Give a sample back, with what dead owners left of it."""
        for generation in range(self._held.pop(sample, -1), -1, -1):
            self._claim_path(sample, generation).unlink(missing_ok=True)

    def holds(self, claim: Path) -> bool:
        """Return whether a claim's owner is alive; one that has just gone counts, as its sample is done."""
        try:
            owner = _owner(claim.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return True
        except ValueError:  # being written, on a file system without links
            return self._age(claim) < BEAT
        return self.alive(owner)

    def alive(self, owner: Owner) -> bool:
        """Return whether a process still works here."""
        if owner.name == self.owner.name:
            return True
        path = self.folder / owner.name
        if not path.exists():
            return False
        return runs(owner.pid, owner.started) if owner.machine == machine() else self._age(path) < PATIENCE

    def others(self) -> list[Owner]:
        """Return the other processes that are alive, and forget the leases of the dead of this machine."""
        found = []
        for owner in owners(self.folder):
            if owner[1:4] == self.owner[1:4]:  # this very process
                continue
            if self.alive(owner):
                found.append(owner)
            elif owner.machine == machine():
                (self.folder / owner.name).unlink(missing_ok=True)
        return found

    def _claim_path(self, sample: str, generation: int) -> Path:
        return self.folder / f"{sample}~{generation}"  # "~" is in no id

    def _link(self, path: Path) -> None:
        try:
            os.link(self.path, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            _write_new(path, json.dumps(self.owner._asdict()))

    def _age(self, path: Path) -> float:
        """Return seconds since a file was touched, by the clock of the file system."""
        try:
            os.utime(self.path)
            return self.path.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the folder is away for a moment; the next beat tells again
                os.utime(self.path)


def owners(folder: Path) -> list[Owner]:
    """Return everyone who has a lease in a folder, dead or alive."""
    found = []
    for path in sorted(folder.glob("*.lease")):
        with contextlib.suppress(FileNotFoundError, ValueError):  # gone meanwhile, or being written
            owner = _owner(path.read_text(encoding="utf-8"))
            if owner.name == path.name:
                found.append(owner)
    return found


def _owner(text: str) -> Owner:
    """Read what a lease says; its name is a file's of the same folder.

    Raises:
        ValueError: it is none.
    """
    try:
        owner = Owner(**json.loads(text))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a lease: {error}") from error
    kinds = (str, str, int, int, str)
    if not all(type(value) is kind for value, kind in zip(owner, kinds, strict=True)):
        raise ValueError("not a lease: a field of another type")
    if Path(owner.name).name != owner.name:
        raise ValueError("not a lease: a name of another folder")
    return owner


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet.

    Raises:
        FileExistsError: it is.
    """
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
