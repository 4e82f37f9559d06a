"""Which denoising step is running, as one of ``T`` time groups: step ``i`` of ``n`` is in group ``⌊i·T/n⌋``.

Group 0 holds the first, noisiest steps. A solver may call the model more often than it steps (Heun, PNDM), a pipeline
may skip the first steps (img2img strength), and a tracer may see several runs; each clock says how it tells.
"""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor


class Moment(NamedTuple):
    """Where in a run one evaluation of the model stands; None: the clock cannot know."""

    group: int  # time group
    step: int | None = None  # the user's step
    steps: int | None = None  # of the run
    evaluations: int | None = None  # of the run
    first: bool = False  # the run's first evaluation


class Clock(Protocol):
    """Tells the time of one evaluation of the model."""

    stepped: bool | None  # whether a scheduler has stepped between the last two evaluations; None: unknown

    def read(self, timestep: float, time_groups: int) -> Moment:
        """The moment of the model call that is about to run at ``timestep``. Raises ValueError where it can't tell."""

    def restart(self) -> None:
        """Forget the run so far."""


class TimestepClock:
    """A bare model's clock: equal ranges of the training timesteps ``[0, num_train_timesteps)``, noisiest first."""

    stepped = None

    def __init__(self, num_train_timesteps: int = 1000):
        self.num_train_timesteps = num_train_timesteps

    def read(self, timestep: float, time_groups: int) -> Moment:
        if not 0 <= timestep <= self.num_train_timesteps:
            raise ValueError(
                f"timestep {timestep} is outside [0, {self.num_train_timesteps}): pass num_steps= or scheduler= so "
                "that steps are counted instead"
            )
        return Moment(max(time_groups - 1 - int(timestep * time_groups / self.num_train_timesteps), 0))

    def restart(self) -> None:
        pass


class CountingClock:
    """Counts the distinct timesteps of a run of ``num_steps``; a timestep that comes back later starts a new run.

    Repeats in a row are one step (guidance in two calls, Heun, PNDM).
    """

    stepped = None

    def __init__(self, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.num_steps = num_steps
        self.restart()

    def restart(self) -> None:
        self._seen: list[float] = []

    def read(self, timestep: float, time_groups: int) -> Moment:
        if timestep in self._seen[:-1]:
            self._seen = []
        first = not self._seen
        if not self._seen or self._seen[-1] != timestep:
            if len(self._seen) == self.num_steps:
                raise ValueError(
                    f"the model is called at a {self.num_steps + 1}th timestep, {timestep}, in a run of "
                    f"num_steps={self.num_steps}: correct num_steps, pass scheduler= instead, or reset() the tracer "
                    "before a run over other timesteps"
                )
            self._seen.append(timestep)
        step = len(self._seen) - 1
        return Moment(step * time_groups // self.num_steps, step, self.num_steps, self.num_steps, first)


class SchedulerClock:
    """Counts a diffusers scheduler's ``step`` calls since ``set_timesteps``, in the user's steps.

    The user's step of an evaluation is what the pipelines' own progress bar shows when it runs: solvers of order 2 make
    two evaluations a step, and PNDM's extra evaluations belong to its first step (Runge-Kutta warm-up: four a step).

    Args:
        scheduler: watched from now until ``close``; only the two methods of this instance are wrapped.
        evaluations: returns how many evaluations the running loop makes, where a pipeline knows (else None).
    """

    def __init__(self, scheduler, evaluations=lambda: None):
        self.scheduler = scheduler
        self._evaluations = evaluations
        self._watched = ExitStack()
        self.restart()
        for name in ("step", "set_timesteps"):
            self._watched.enter_context(_after(scheduler, name, getattr(self, f"_on_{name}")))

    def close(self) -> None:
        """Gives the scheduler its own methods back."""
        self._watched.close()

    def restart(self) -> None:
        self._count = 0
        self._start: int | None = None
        self._counted: int | None = None  # at the last evaluation
        self.stepped = True

    def _on_step(self) -> None:
        self._count += 1

    def _on_set_timesteps(self) -> None:
        self.restart()

    def read(self, timestep: float, time_groups: int) -> Moment:
        timesteps = self.scheduler.timesteps
        if timesteps is None or len(timesteps) == 0:
            raise ValueError(f"{type(self.scheduler).__name__} has no timesteps yet: call its set_timesteps first")
        first = self._start is None
        if first:
            self._start = self._find_start(timestep)
        evaluations = self._evaluations() or len(timesteps) - self._start
        step, steps = self._user_step(len(timesteps), evaluations)
        self.stepped, self._counted = self._counted != self._count, self._count
        return Moment(min(step * time_groups // steps, time_groups - 1), step, steps, evaluations, first)

    def _find_start(self, timestep: float) -> int:
        """img2img starts inside the schedule: at the scheduler's ``begin_index``, or else where ``timestep`` stands."""
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return begin
        distance = [abs(float(t) - timestep) for t in self.scheduler.timesteps]
        nearest = [i for i, d in enumerate(distance) if d == min(distance)]
        order = getattr(self.scheduler, "order", 1)
        return next(
            (i for i in nearest if i % order == 0), nearest[0]
        )  # a solver's own steps start at its order's multiples

    def _user_step(self, schedule: int, evaluations: int) -> tuple[int, int]:
        """(index, number) of the user's step that the running evaluation belongs to."""
        order = getattr(self.scheduler, "order", 1)
        asked = getattr(self.scheduler, "num_inference_steps", None) or math.ceil(schedule / order)
        runge_kutta = getattr(self.scheduler, "prk_timesteps", None)
        if runge_kutta is not None and len(runge_kutta) and self._start == 0:
            count = self._count // 4 if self._count < len(runge_kutta) else self._count - len(runge_kutta) * 3 // 4
            return min(count, asked - 1), asked
        extra = schedule - asked * order  # PNDM: 1 evaluation more than steps; Heun: 2n - 1 evaluations
        steps = max(math.ceil((evaluations - extra) / order), 1)
        done = max(self._count - max(extra, 0), 0) // order
        return min(done, steps - 1), steps


@contextmanager
def _after(obj, name: str, callback):
    """While open, ``callback()`` follows each call of ``obj.name``; afterwards the instance is as it was."""
    original = getattr(obj, name)
    had_own = name in vars(obj)

    @functools.wraps(original)  # pipelines read the signature (`eta`, `generator`, …)
    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        callback()
        return result

    setattr(obj, name, wrapper)
    try:
        yield
    finally:
        if had_own:
            setattr(obj, name, original)
        elif vars(obj).get(name) is wrapper:
            delattr(obj, name)


def read_timestep(timestep: Tensor | float) -> float:
    """The timestep of a model call as a number; a batch of them must agree on the first."""
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
