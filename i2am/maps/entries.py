"""Recorded attention calls: queries, keys and both log-sum-exps, in memory or in a file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from i2am._files import write_atomically


@dataclass(frozen=True)
class Entry:
    """One recorded attention call of one layer and reference. ``Q`` generated queries, ``K`` reference keys.

    ``tensors`` holds ``q [B, H, Q, d], k [B, H, K, d], row_lse [B, H, Q], col_lse [B, H, K]`` and perhaps
    ``mask`` (broadcasts to ``[B, H, Q, K]``); those of a file are read when asked for.
    """

    layer: str
    reference: str
    group: int
    scale: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    file: Path | None = None
    keys: dict[str, str] = field(default_factory=dict)  # tensor → its name in the file

    def read(self) -> dict[str, Tensor]:
        """The tensors, as they were kept."""
        if self.file is None:
            return self.tensors
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            return {name: file.get_tensor(key) for name, key in self.keys.items()}


def pack(entries: list[Entry], prefix: str = "") -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    """Entries in memory as the contents of a file: ``(name → tensor, tensor → name per entry)``; shared ones once."""
    names: dict[int, str] = {}
    contents, keys = {}, []
    for entry in entries:
        for x in entry.tensors.values():
            name = names.setdefault(id(x), f"{prefix}{len(names)}")
            contents[name] = x
        keys.append({n: names[id(x)] for n, x in entry.tensors.items()})
    return contents, keys


def write_entries(path: Path, entries: list[Entry]) -> list[Entry]:
    """Writes entries into one safetensors file; returns them as entries of that file."""
    from safetensors.torch import save_file

    contents, keys = pack(entries)
    write_atomically(path, lambda unfinished: save_file(contents, unfinished))
    return [replace(e, tensors={}, file=path, keys=k) for e, k in zip(entries, keys, strict=True)]
