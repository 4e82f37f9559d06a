"""Recorded attention calls: queries, keys and both log-sum-exps, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from i2am._files import write_atomically


@dataclass(frozen=True)
class QKEntry:
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
    tensor_names: dict[str, str] = field(default_factory=dict)  # tensor → its name in the file
    cut: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # takes a part out of what is read

    def read(self) -> dict[str, Tensor]:
        """Return the tensors, as they were kept; or the part of them that :attr:`cut` takes out.

        Raises:
            FileNotFoundError: the file that held them has gone.
            ValueError: it is damaged, or no longer the file that was written.
        """
        tensors = self._read_all()
        return tensors if self.cut is None else self.cut(tensors)

    def _read_all(self) -> dict[str, Tensor]:
        if self.file is None:
            return self.tensors
        from safetensors import SafetensorError, safe_open

        if not self.file.is_file():
            raise FileNotFoundError(f"the record {self.file} is not there any more")
        try:
            with safe_open(self.file, framework="pt") as file:
                return {name: file.get_tensor(stored) for name, stored in self.tensor_names.items()}
        except SafetensorError as error:
            raise ValueError(f"the record {self.file} is damaged or was replaced: {error}") from error


def pack(entries: Sequence[QKEntry], prefix: str = "") -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    """Lay entries in memory out as the contents of a file, a tensor that several share once.

    Returns: ``(stored name → tensor, tensor → stored name of each entry)``.
    """
    stored: dict[int, str] = {}
    contents: dict[str, Tensor] = {}
    tensor_names = []
    for entry in entries:
        for x in entry.tensors.values():
            name = stored.setdefault(id(x), f"{prefix}{len(stored)}")
            contents[name] = x
        tensor_names.append({n: stored[id(x)] for n, x in entry.tensors.items()})
    return contents, tensor_names


def write_entries(path: Path, entries: Sequence[QKEntry]) -> list[QKEntry]:
    """Write entries into one safetensors file; return them as entries of that file."""
    from safetensors.torch import save_file

    contents, tensor_names = pack(entries)
    write_atomically(path, lambda unfinished: save_file(contents, unfinished))
    return [replace(e, tensors={}, file=path, tensor_names=n) for e, n in zip(entries, tensor_names, strict=True)]


Entry = QKEntry  # the name that i2am.tracing still imports
