"""This process among its fellows: those of ``accelerate launch``, ``torchrun`` or ``srun``, or tasks of a SLURM array.

None talks to another: they share a folder of results. What the environment tells them only says where each
begins, which device is its own, and which one says in the end how all have fared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from i2am.evaluate import Store

PATIENCE = 600.0  # seconds to wait for the first process to restart a folder


@dataclass(frozen=True)
class Process:
    """One of ``count`` processes, of which the first speaks for all where they were launched as one."""

    index: int = 0
    count: int = 1
    launch: str = ""  # what the processes of one launch have in common; "" where each was started for itself
    local: int = 0  # its number on its machine

    @classmethod
    def of_environment(cls) -> Process:
        """Read who this process is from the environment: each task of a SLURM array may itself be several."""
        index, count = _part("RANK", "WORLD_SIZE")
        if count > 1:
            name = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
            return cls(index, count, name, _number("LOCAL_RANK", 0))
        index, count = _part("SLURM_PROCID", "SLURM_NTASKS")
        array = "SLURM_ARRAY_TASK_"
        task, tasks = _part(f"{array}ID", f"{array}COUNT", _number(f"{array}MIN", 0), _number(f"{array}STEP", 1))
        return cls(task * count + index, tasks * count, local=_number("SLURM_LOCALID", 0))

    @property
    def speaks(self) -> bool:
        """Return whether this process says how all of its launch have fared."""
        return not self.launch or self.index == 0

    @property
    def name(self) -> str:
        """Return the process as its lease names it: "host:port/rank"."""
        return f"{self.launch}/{self.index}" if self.launch else ""

    def own_device(self, asked: torch.device | None) -> torch.device | None:
        """Return the device of this process: one GPU each, where none or just "cuda" was asked for."""
        import torch

        if not self.launch or not torch.cuda.is_available() or (asked is not None and asked.type != "cuda"):
            return asked
        return torch.device("cuda", self.local % torch.cuda.device_count())

    def order(self, places: Sequence[int]) -> list[int]:
        """Return every place, this process's own share first, so that processes meet late."""
        return [p for k in range(self.count) for p in places[(self.index + k) % self.count :: self.count]]

    def wait_for_first(self, store: Store) -> None:
        """Wait until the first process of this launch works in the folder.

        Raises:
            TimeoutError: it does not.
        """
        end = time.monotonic() + PATIENCE
        while not any(owner.launch == f"{self.launch}/0" for owner in store.visitors()):
            if time.monotonic() > end:
                raise TimeoutError("the first process has not restarted the folder")
            time.sleep(0.2)


def _part(own: str, all_of_them: str, first: int = 0, step: int = 1) -> tuple[int, int]:
    """Return ``(own number, how many)`` of numbers that begin with ``first`` and go in steps; (0, 1): just this one."""
    count = _number(all_of_them, 1)
    if count < 2 or own not in os.environ:
        return 0, 1
    return (_number(own, 0) - first) // max(step, 1) % count, count


def _number(name: str, otherwise: int) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return otherwise
