"""Recorded queries and keys: what lets any patch be asked afterwards. ``O(N·d)`` per call, never ``N²``.

An entry keeps the generated queries, the reference keys and both log-sum-exps of one attention call: the row
probability of any query is then ``exp(scale·q·kᵀ − row_lse)``, its column probability ``exp(scale·q·kᵀ − col_lse)``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from i2am._files import parse_size, show_size
from i2am.maps.entries import Entry, write_entries
from i2am.maps.placed import Tile
from i2am.tracing.options import RecordOptions


class QKRecord:
    """The entries of a tracer, in memory or in a folder with one safetensors file a forward."""

    def __init__(self, options: RecordOptions):
        self.options = options
        self._limit = parse_size(options.record_limit)
        self.folder: Path | None = None
        self.entries: list[Entry] = []
        self.nbytes = 0
        self._pending: list[Entry] = []  # of the running forward
        self._query: tuple[object, Tensor] | None = None  # the last one kept: an IP-Adapter layer asks several times

    def add(
        self,
        layer: str,
        group: int,
        scale: float,
        q: Tensor,
        row_lse: Tensor,
        references: dict[str, dict[str, Tensor]],
        tile: Tile | None = None,
    ) -> None:
        """Keep a copy of one call until :meth:`flush`.

        Args:
            q: ``[B, H, Q, d]`` generated queries; row_lse: ``[B, H, Q]``.
            references: name → ``k``, ``col_lse`` and perhaps ``mask``.
            tile: where the queries lie on the layer's grid of the whole picture.

        Raises:
            ValueError: the record would pass its limit.
        """
        call = (layer, q.data_ptr(), q.shape)
        if self._query is None or self._query[0] != call:
            self._query = (call, self._keep(q, self.options.record_dtype))
        shared = {"q": self._query[1], "row_lse": self._keep(row_lse)}
        for name, own in references.items():
            kept = {n: self._keep(x, self.options.record_dtype if n == "k" else None) for n, x in own.items()}
            self._pending.append(Entry(layer, name, group, scale, tensors=shared | kept, tile=tile))
        if self.nbytes + self._pending_bytes() > self._limit:
            raise ValueError(
                f"the record grows past record_limit={show_size(self._limit)}: the run makes more model calls than its "
                "steps "
                "told; raise the limit or set record_every="
            )

    def flush(self) -> None:
        """End a forward: its entries count from now on; on disk, its file is written at once or not at all."""
        if not self._pending:
            return
        entries, size = self._pending, self._pending_bytes()
        if self.options.record_to not in ("cpu", None):
            self.folder = self.folder or self._make_folder()
            path = self.folder / f"{len({e.file for e in self.entries}):06d}.safetensors"
            entries = write_entries(path, entries)
        self.entries += entries
        self.nbytes += size
        self.drop()

    def drop(self) -> None:
        """Forget the running forward."""
        self._pending, self._query = [], None

    def _pending_bytes(self) -> int:
        return sum({id(x): x.nbytes for e in self._pending for x in e.tensors.values()}.values())

    def _keep(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        device = x.device if self.options.record_to is None else "cpu"
        return x.detach().to(device, dtype or x.dtype, copy=True).contiguous()

    def _make_folder(self) -> Path:
        if self.options.record_to == "disk":
            return Path(tempfile.mkdtemp(prefix="i2am-record-"))
        folder = Path(self.options.record_to or "")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"record_to={str(folder)!r} is not empty: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def mask_between(mask: Tensor, queries: slice | Tensor, keys: slice | Tensor, layer: str) -> Tensor:
    """Return the part of an attention mask between some queries and keys, ``[B | 1, H | 1, 1, K | 1]``.

    Raises:
        ValueError: it masks other keys for each of the queries: keeping it would take as much as the attention itself.
    """
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    mask = mask[..., keys] if mask.shape[3] > 1 else mask
    if mask.shape[2] > 1:
        rows = mask[:, :, queries]
        mask = rows[:, :, :1]
        if not bool((rows == mask).all()):  # those of text and reference may differ, these are looked at
            raise ValueError(
                f"layer {layer}: its attention mask has a row per query and can't be recorded; leave it out with "
                "layers=, or register patches with sram= instead of record="
            )
    return mask
