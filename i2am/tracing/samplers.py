"""Steps of CompVis' samplers (``PLMSSampler``, ``DDIMSampler``), as Paint-by-Example and StableVITON bring them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from i2am.tracing.clock import Clock, StepInfo
from i2am.tracing.watch import unwatch, watch


class SamplerClock(Clock):
    """Counts a sampler's ``p_sample_…`` calls since ``make_schedule``: a step each.

    A step evaluates the model at its own timestep; PLMS' first one also at the next, which counts as a part of it.

    Args:
        sampler: watched from ``open`` until ``close``.
    """

    knows_steps = True

    def __init__(self, sampler: Any):
        self.sampler = sampler
        self.restart()

    def open(self) -> None:
        watch(self.sampler, self)

    def close(self) -> None:
        unwatch(self.sampler, self)

    def restart(self) -> None:
        self._count = 0  # steps
        self._first = True
        self._before: tuple[int, float] | None = None  # steps and timestep of the last evaluation
        self._latents: tuple[int, ...] | None = None

    def on_step(self, sample: object) -> None:
        """Note that the sampler has stepped ``sample``."""
        self._count += 1
        if isinstance(sample, Tensor):
            self._latents = tuple(sample.shape)

    def on_set_timesteps(self) -> None:
        """Note that the sampler begins a run."""
        self.restart()

    def latents(self) -> tuple[int, ...] | None:
        return self._latents

    def read(self, timestep: float, time_groups: int) -> StepInfo:
        name, schedule = type(self.sampler).__name__, getattr(self.sampler, "ddim_timesteps", None)
        if schedule is None:
            raise ValueError(
                f"{name} has no schedule yet: its sample() makes one; pass the sampler that drives the loop"
            )
        timesteps = sorted((float(t) for t in schedule), reverse=True)
        here = timesteps[self._count : self._count + 1 + (self._count == 0)]
        if timestep not in here:
            stands = f"stands at {here[0]:g}" if here else "is over"
            raise ValueError(
                f"the model is called at timestep {timestep:g}, but the run of {name}, which is watched, {stands} "
                f"after {self._count} steps: pass the sampler that drives the loop"
            )
        now, before, first = (self._count, timestep), self._before, self._first
        self._before, self._first = now, False
        steps = len(timesteps)
        group = min(self._count * time_groups // steps, time_groups - 1)
        return StepInfo(group, self._count, steps, steps + 1, first, now != before, None)
