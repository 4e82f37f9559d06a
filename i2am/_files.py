"""Files that are whole or not there, and sizes as people write them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def parse_size(size: str | int) -> int:
    """Read "2GB", "500 MB" or a number of bytes (decimal units) as bytes."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?B)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if match is None:
        raise ValueError(f'a size is a number of bytes or like "2GB", got {size!r}')
    return int(float(match[1]) * UNITS[match[2].upper()])


def show_size(nbytes: float) -> str:
    """Write a size as people do: 1.2 GB."""
    unit = max((u for u in UNITS if nbytes >= UNITS[u]), key=UNITS.__getitem__, default="B")
    return f"{nbytes / UNITS[unit]:.3g} {unit}"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(unfinished)`` for a file beside ``path``, which takes its name only when whole."""
    unfinished = path.with_name(path.name + ".part")
    try:
        write(unfinished)
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)  # safetensors makes files that only their owner reads
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
