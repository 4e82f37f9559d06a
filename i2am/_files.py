"""Files that are whole or not there, the processes that write them, and sizes as people write them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
UMASK = os.umask(0)
os.umask(UMASK)
UNFINISHED = re.compile(r"\.i2am-(?P<machine>[\w-]+)\.(?P<pid>[0-9]+)\.(?P<started>[0-9]+)\.[0-9a-f]+\.part")


def parse_size(size: str | int) -> int:
    """Read "2GB", "500 MB", "1.5 GiB" or a number of bytes as bytes."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    written = isinstance(size, str) and re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?i?B)\s*", size, re.IGNORECASE)
    count = float(written[1]) * (UNITS | BINARY).get(written[2].upper(), 0) if written else 0
    if not 1 <= count < 2**63:
        raise ValueError(f'a size is a number of bytes or like "2GB" or "2GiB", got {size!r}')
    return int(count)


def show_size(nbytes: float) -> str:
    """Write a size as people do: 1.2 GB."""
    unit = max((u for u in UNITS if nbytes >= UNITS[u]), key=UNITS.__getitem__, default="B")
    return f"{nbytes / UNITS[unit]:.3g} {unit}"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write(unfinished)`` make a file beside ``path``; it takes its name only when whole and on the disk.

    The unfinished file's name is this process's alone: any number of processes may write the same ``path``, and
    a reader sees one whole file or another.
    """
    unfinished = unfinished_path(path.parent)
    try:
        write(unfinished)
        unfinished.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner reads
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_path(folder: Path) -> Path:
    """Name a new file or folder in ``folder`` that says whose it is, and that no other process names."""
    machine, pid, started = this_process()
    return folder / f".i2am-{machine}.{pid}.{started}.{uuid.uuid4().hex[:12]}.part"


def abandoned(path: Path) -> bool:
    """Return whether an unfinished file or folder was left by a process of this machine that has ended."""
    match = UNFINISHED.fullmatch(path.name)
    if match is None:
        return False
    return match["machine"] == machine() and not runs(int(match["pid"]), int(match["started"]))


def sync(path: Path) -> None:
    """Have a file's or folder's contents written to the disk; where that cannot be asked for, go on without."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def this_process() -> tuple[str, int, int]:
    """Return ``(machine, pid, start time)`` of this process; a child's after a fork."""
    pid = os.getpid()
    return machine(), pid, _started(pid)


@functools.cache
def machine() -> str:
    """Name what shares this process's pids: the host, its boot, and the pid namespace (containers have their own)."""
    parts = []
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(file) if file.endswith("pid") else Path(file).read_text().strip())
    host = re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:40] or "host"
    return f"{host}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def runs(pid: int, started: int) -> bool:
    """Return whether a process of this machine still runs: its pid does, and started when it did.

    True where that cannot be asked.
    """
    if os.name == "nt":  # there, signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return _started(pid) in (started, 0)


def _started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if that cannot be read, -1 if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    fields = stat.rpartition(b")")[2].split()
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


READS = 100  # of a file that is replaced while it is read


def read_unchanged(path: Path, read: Callable[[Path], T]) -> T:
    """Return ``read(path)`` of one and the same file, also where others replace it meanwhile.

    safetensors opens a path once for its header and once for its tensors: a save in between would mix two files, so
    that a read counts only if the path named the same file before and after it.

    Raises:
        ValueError: what ``read`` raises (a RuntimeError, too); or the file was replaced each time.
    """
    for _ in range(READS):
        before, failed = _identity(path), None
        try:
            contents = read(path)
        except (ValueError, RuntimeError) as error:
            failed = error
        if _identity(path) != before:
            continue
        if failed is not None:
            raise failed if isinstance(failed, ValueError) else ValueError(f"{path}: {failed}") from None
        return contents
    raise ValueError(f"{path} was replaced each of the {READS} times that it was read: load it when its writer is done")


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    """Return the numbers that tell one file of this path from the next; None where there is none."""
    try:
        of = path.stat()
    except OSError:
        return None
    return of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns
