"""Recorded attention calls: queries, keys and both log-sum-exps, in memory or in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from i2am._files import write_atomically
from i2am.maps.placed import Tile


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
    stamp: str | None = None  # of the file; None: of a version that wrote none
    tile: Tile | None = None  # where its queries lie on the picture's grid; None: they are all of it

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
                check_stamp(self.file, file.metadata(), self.stamp)
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


STAMP = "record"  # key of a file's metadata


def stamp_of(entries: Sequence[QKEntry]) -> str:
    """Return a digest of entries in memory, by which the file that holds them is known again.

    It is of their log-sum-exps, which no two runs share and which are small beside queries and keys.
    """
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        digest.update(repr((entry.layer, entry.reference, entry.group)).encode())
        for name in ("row_lse", "col_lse"):
            digest.update(entry.tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_stamp(path: Path, metadata: dict[str, str] | None, stamp: str | None) -> None:
    """Raise ValueError for a file that another run has written since."""
    found = (metadata or {}).get(STAMP)
    if stamp is not None and found != stamp:
        raise ValueError(
            f"the record {path} is another run's (stamp {found}, expected {stamp}): it was replaced since these maps "
            "were made; name a new folder for each run, or save(embed=True)"
        )


def write_entries(path: Path, entries: Sequence[QKEntry]) -> list[QKEntry]:
    """Write entries into one safetensors file; return them as entries of that file."""
    from safetensors.torch import save_file

    contents, tensor_names = pack(entries)
    stamp = stamp_of(entries)
    write_atomically(path, lambda unfinished: save_file(contents, unfinished, metadata={STAMP: stamp}))
    return [
        replace(e, tensors={}, file=path, tensor_names=n, stamp=stamp)
        for e, n in zip(entries, tensor_names, strict=True)
    ]


Entry = QKEntry  # the name that i2am.tracing still imports
