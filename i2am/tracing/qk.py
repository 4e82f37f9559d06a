"""Recorded queries and keys: what lets any patch be asked afterwards. ``O(N·d)`` per call, never ``N²``.

An entry keeps the generated queries, the reference keys and both log-sum-exps of one attention call: the row
probability of any query is then ``exp(scale·q·kᵀ − row_lse)``, its column probability ``exp(scale·q·kᵀ − col_lse)``.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map

from i2am._files import parse_size, show_size
from i2am.maps.entries import Entry, write_entries
from i2am.tracing.clock import Moment

logger = logging.getLogger("i2am")

WORTH_SAYING = 0.1  # of the limit: a smaller record is not announced as loudly


@dataclass(frozen=True)
class RecordOptions:
    """What to keep while tracing, so that patches can be asked afterwards.

    Args:
        record: "qk" keeps queries and keys of the conditional samples; None: nothing.
        record_to: "cpu" (main memory), "disk" (a new folder, which survives the process), the path of a folder to make,
            or None (where the model runs).
        record_every: keep every so many-th step.
        record_times: keep only these time groups. None: all.
        record_dtype: dtype of the kept queries and keys; None: the model's own.
        record_limit: what a run may take, "2GB" or bytes; checked before its first step.
    """

    record: str | None = None
    record_to: str | os.PathLike | None = "cpu"
    record_every: int = 1
    record_times: tuple[int, ...] | None = None
    record_dtype: torch.dtype | None = None
    record_limit: str | int = "2GB"

    def __post_init__(self):
        if self.record not in (None, "qk"):
            raise ValueError(f'record must be "qk" or None, got {self.record!r}')
        if isinstance(self.record_every, bool) or not isinstance(self.record_every, int) or self.record_every < 1:
            raise ValueError(f"record_every must be a positive number of steps, got {self.record_every!r}")
        if self.record_dtype is not None and not self.record_dtype.is_floating_point:
            raise ValueError(f"record_dtype must be a floating point dtype, got {self.record_dtype}")
        parse_size(self.record_limit)

    def wants(self, moment: Moment) -> bool:
        """Whether a moment's calls are kept."""
        if self.record is None or (self.record_times is not None and moment.group not in self.record_times):
            return False
        return moment.step is None or moment.step % self.record_every == 0

    def share(self, steps: int, time_groups: int) -> int:
        """How many of a run's steps are kept."""
        return sum(self.wants(Moment(i * time_groups // steps, i)) for i in range(steps))


class Record:
    """The entries of a tracer, in memory or in a folder with one safetensors file a forward."""

    def __init__(self, options: RecordOptions):
        self.options = options
        self.folder: Path | None = None
        self.entries: list[Entry] = []
        self.nbytes = 0
        self._pending: list[Entry] = []  # of the running forward
        self._query: tuple[object, Tensor] | None = None  # the last one kept: an IP-Adapter layer asks several times

    def add(
        self, layer: str, group: int, scale: float, q: Tensor, row_lse: Tensor, references: dict[str, dict[str, Tensor]]
    ) -> None:
        """Keeps a copy of one call until :meth:`flush`.

        Args:
            q: ``[B, H, Q, d]`` generated queries; row_lse: ``[B, H, Q]``.
            references: name → ``k``, ``col_lse`` and perhaps ``mask``.

        Raises:
            ValueError: the record would pass its limit.
        """
        call = (layer, q.data_ptr(), q.shape)
        if self._query is None or self._query[0] != call:
            self._query = (call, self._keep(q, self.options.record_dtype))
        shared = {"q": self._query[1], "row_lse": self._keep(row_lse)}
        for name, own in references.items():
            kept = {n: self._keep(x, self.options.record_dtype if n == "k" else None) for n, x in own.items()}
            self._pending.append(Entry(layer, name, group, scale, tensors=shared | kept))
        limit = parse_size(self.options.record_limit)
        if self.nbytes + self._pending_bytes() > limit:
            raise ValueError(
                f"the record grows past record_limit={show_size(limit)}: the run makes more model calls than its steps "
                "told; raise the limit or set record_every="
            )

    def flush(self) -> None:
        """Ends a forward: its entries count from now on; on disk, its file is written at once or not at all."""
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
        """Forgets the running forward."""
        self._pending, self._query = [], None

    def _pending_bytes(self) -> int:
        return sum({id(x): x.nbytes for e in self._pending for x in e.tensors.values()}.values())

    def _keep(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        device = x.device if self.options.record_to is None else "cpu"
        return x.detach().to(device, dtype or x.dtype, copy=True).contiguous()

    def _make_folder(self) -> Path:
        if self.options.record_to == "disk":
            return Path(tempfile.mkdtemp(prefix="i2am-record-"))
        folder = Path(self.options.record_to)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"record_to={str(folder)!r} is not empty: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def check_limit(options: RecordOptions, per_evaluation: int, moment: Moment, time_groups: int, have: int = 0) -> None:
    """Announces what a run's record will take, and refuses it when that is too much.

    Args:
        per_evaluation: bytes of one evaluation of the model.
        moment: the run's first.
        have: bytes of earlier runs.

    Raises:
        ValueError: it would not fit; names three settings that would.
    """

    def total(o: RecordOptions) -> int:
        kept = o.share(moment.steps, time_groups)
        return per_evaluation * math.ceil(kept * moment.evaluations / moment.steps)

    limit, needed = parse_size(options.record_limit), total(options)
    where = {"cpu": "main memory", None: "the model's device"}.get(options.record_to, "a folder on disk")
    plan = (
        f"record: {show_size(per_evaluation)} a model call, {show_size(needed)} for {moment.steps} steps, in {where} "
        f"(record_limit {show_size(limit)})"
    )
    if have + needed <= limit:
        logger.log(logging.WARNING if needed > WORTH_SAYING * limit else logging.INFO, plan)
        return
    room = max(limit - have, 1)
    every = next((n for n in range(2, moment.steps + 1) if total(replace(options, record_every=n)) <= room), None)
    group = replace(options, record_times=(time_groups - 1,))
    fits = [
        f"record_every={every} ({show_size(total(replace(options, record_every=every)))})" if every else None,
        f"record_times=[{time_groups - 1}] ({show_size(total(group))})" if total(group) <= room else None,
        f'record_limit="{math.ceil((have + needed) / 1e9)}GB" with record_to="disk"',
        "fewer layers=",
    ]
    raise ValueError(f"{plan}: too much. These fit: {', '.join([f for f in fits if f][:3])}")


def mask_between(mask: Tensor, queries: slice | Tensor, keys: slice | Tensor, layer: str) -> Tensor:
    """The part of an attention mask between some queries and keys, ``[B | 1, H | 1, 1, K | 1]``.

    Raises:
        ValueError: it has a row per query: keeping it would take as much as the attention itself.
    """
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    if mask.shape[2] > 1:
        raise ValueError(
            f"layer {layer}: its attention mask has a row per query and can't be recorded; leave it out with layers="
        )
    return mask[..., keys] if mask.shape[3] > 1 else mask


def run_on_shapes(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """One forward of ``model`` on fake tensors: every module runs, nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(x):
        return mode.from_tensor(x) if isinstance(x, Tensor) else x

    state = {name: fake(x) for name, x in (*model.named_parameters(), *model.named_buffers())}
    with torch.no_grad(), mode:
        functional_call(model, state, tree_map(fake, args), tree_map(fake, kwargs))
