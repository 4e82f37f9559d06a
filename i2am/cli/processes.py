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

PARTS = (  # (own number, how many, first number)
    ("RANK", "WORLD_SIZE", ""),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
)
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
        """Read who this process is from the environment."""
        for own, all_of_them, first in PARTS:
            count = _number(all_of_them, 1)
            if count > 1 and own in os.environ:
                launched = own == "RANK"
                name = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}" if launched else ""
                index = (_number(own, 0) - _number(first, 0)) % count
                return cls(index, count, name, _number("LOCAL_RANK" if launched else "SLURM_LOCALID", 0))
        return cls()

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


def _number(name: str, otherwise: int) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return otherwise
