"""Which denoising step is running, as one of ``T`` time groups: step ``i`` of ``n`` is in group ``⌊i·T/n⌋``.

Group 0 holds the first, noisiest steps. A solver may call the model more often than it steps (Heun, PNDM), a pipeline
may skip the first steps (img2img strength), and a tracer may see several runs; each clock says how it tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from i2am.tracing.watch import unwatch, watch

BFLOAT16 = 2.0**-7  # models are given timesteps in their own dtype: half a step of its mantissa, and some


class Unexplained(ValueError):
    """A call of which neither the pipeline nor the evidence says what it is: what was counted before may be wrong."""


class StepInfo(NamedTuple):
    """Place of one evaluation of the model in a run; None: the clock cannot know."""

    group: int  # time group
    step: int | None = None  # the user's step
    steps: int | None = None  # of the run
    evaluations: int | None = None  # of the run
    first: bool = False  # the run's first evaluation
    stepped: bool | None = None  # whether the scheduler has stepped since the last evaluation; None: nobody tells
    taken: int | None = None  # steps that the scheduler has taken; each tile of a picture tells by it what is new


class Clock:
    """Tells the time of one evaluation of the model."""

    knows_steps = False  # before the first evaluation, how many there will be
    called: tuple[int, int] | None = None  # size of the last call's latents, where they were taken for the picture
    on_other_size: Callable[[Any, Any], None] = staticmethod(lambda size, whole: None)  # told what they are a part of
    cut_short = False  # the run before this one had not ended when its scheduler was set anew

    def read(self, timestep: float, time_groups: int) -> StepInfo:
        """Return where the model call that is about to run at ``timestep`` stands. Raises ValueError if unknown."""
        raise NotImplementedError

    def restart(self) -> None:
        """Forget the run so far."""

    def latents(self) -> tuple[int, ...] | None:
        """Return the shape of what a scheduler steps; None: no scheduler, or none has stepped yet."""
        return None

    def open(self) -> None:
        """Begin to watch."""

    def close(self) -> None:
        """Stop watching. Idempotent."""


class TimestepClock(Clock):
    """A bare model's clock: equal ranges of the training timesteps ``[0, num_train_timesteps)``, noisiest first."""

    def __init__(self, num_train_timesteps: int = 1000):
        self.num_train_timesteps = num_train_timesteps
        self.restart()

    def restart(self) -> None:
        self._highest: float | None = None  # timestep of the calls so far

    def read(self, timestep: float, time_groups: int) -> StepInfo:
        if not 0 <= timestep <= self.num_train_timesteps:
            raise ValueError(
                f"timestep {timestep:g} is outside [0, {self.num_train_timesteps}): pass num_steps= or scheduler= so "
                "that steps are counted instead"
            )
        early = self._highest is None and timestep < self.num_train_timesteps / 10
        if timestep != int(timestep) and (early or (self._highest is not None and self._highest <= 1)):
            first = "the first call's timestep is" if early else f"calls were at timesteps up to {self._highest:g}, now"
            raise Unexplained(
                f"{first} {timestep:g}: a sigma rather than a timestep of [0, {self.num_train_timesteps})? Pass "
                "num_steps= or scheduler= so that steps are counted instead"
            )
        self._highest = timestep if self._highest is None else max(self._highest, timestep)
        return StepInfo(max(time_groups - 1 - int(timestep * time_groups / self.num_train_timesteps), 0))


class CountingClock(Clock):
    """Counts the distinct timesteps of a run of ``num_steps``; a timestep that comes back later starts a new run.

    Repeats in a row are one step (guidance in two calls). Each run goes over the same timesteps.
    """

    knows_steps = True

    def __init__(self, num_steps: int):
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps!r}")
        self.num_steps = num_steps
        self.restart()

    def restart(self) -> None:
        self._seen: list[float] = []
        self._before: list[float] = []  # of the runs before

    def read(self, timestep: float, time_groups: int) -> StepInfo:
        if timestep in self._seen[:-1]:
            if timestep != self._seen[0]:
                raise self._not_of_this_run(timestep, "which this run has passed")
            self._seen, self._before = [], max(self._seen, self._before, key=len)
        first = not self._seen
        if not self._seen or self._seen[-1] != timestep:
            if len(self._seen) == self.num_steps:
                raise Unexplained(
                    f"the model is called at a {self.num_steps + 1}th timestep, {timestep:g}, in a run of "
                    f"num_steps={self.num_steps}: correct num_steps, pass scheduler= instead, or reset() the tracer "
                    "before a run over other timesteps"
                )
            at = len(self._seen)
            if at < len(self._before) and self._before[at] != timestep:
                raise self._not_of_this_run(timestep, f"where the run before was at {self._before[at]:g}")
            if at > 1 and (timestep < self._seen[-1]) != (self._seen[1] < self._seen[0]):
                raise self._not_of_this_run(timestep, f"after {self._seen[-2]:g} and {self._seen[-1]:g}")
            self._seen.append(timestep)
        step = len(self._seen) - 1
        return StepInfo(step * time_groups // self.num_steps, step, self.num_steps, self.num_steps, first)

    def _not_of_this_run(self, timestep: float, why: str) -> ValueError:
        return ValueError(
            f"the model is called at timestep {timestep:g} at step {len(self._seen)} of num_steps={self.num_steps}, "
            f"{why}: not a step of this run? Pass scheduler= instead, or reset() the tracer before a run over other "
            "timesteps"
        )


class SchedulerClock(Clock):
    """Counts a diffusers scheduler's ``step`` calls since ``set_timesteps``, in the user's steps.

    The user's step of an evaluation is what the pipelines' own progress bar shows when it runs: solvers of order 2 make
    two evaluations a step, and PNDM's extra evaluations belong to its first step (Runge-Kutta warm-up: four a step).

    Args:
        scheduler: a scheduler, or a function that returns the one in use (``pipe.scheduler`` may be replaced); watched
            from ``open`` until ``close``. Nothing is written into it, so copies and pickles carry nothing.
        evaluations: returns how many evaluations the running loop makes, where a pipeline knows (else None).
        given: from a timestep of the schedule to what the model is given; None: the same.
    """

    knows_steps = True

    def __init__(
        self,
        scheduler: Any,
        evaluations: Callable[[], int | None] = lambda: None,
        given: Callable[[float], float] | None = None,
    ):
        self._source = (
            scheduler if callable(scheduler) and not hasattr(scheduler, "set_timesteps") else lambda: scheduler
        )
        self.scheduler = self._source()
        self._evaluations = evaluations
        self._given = given or float
        self._count, self._expected = 0, 0
        self._start: int | None = None
        self._read: tuple[Any, list[float]] | None = None  # the schedule that was read last, and its numbers
        self.restart()

    def open(self) -> None:
        watch(self.scheduler, self)

    def close(self) -> None:
        unwatch(self.scheduler, self)

    def restart(self) -> None:
        self.cut_short = self._start is not None and self._count < self._expected
        self._count = 0
        self._expected = 0  # evaluations
        self._start = None
        self._counted: int | None = None  # at the last evaluation
        self._latents: tuple[int, ...] | None = None
        self.called = None

    def on_step(self, sample: object) -> None:
        """Note that the scheduler has stepped ``sample``."""
        self._count += 1
        if isinstance(sample, Tensor):
            self._latents = tuple(sample.shape)
            if self.called is not None and sample.ndim >= 4 and self.called != self._latents[-2:]:
                self.on_other_size(self.called, self._latents[-2:])
        self.called = None

    def on_set_timesteps(self) -> None:
        """Note that the scheduler begins a run."""
        self.restart()

    def latents(self) -> tuple[int, ...] | None:
        return self._latents

    def read(self, timestep: float, time_groups: int) -> StepInfo:
        self._follow()
        timesteps = self.scheduler.timesteps
        if timesteps is None or len(timesteps) == 0:
            raise ValueError(f"{type(self.scheduler).__name__} has no timesteps yet: call its set_timesteps first")
        start, first = self._start, self._start is None
        if start is None:
            self._starts = self._find_starts(timestep)
            start = self._start = self._starts[0]
            self._expected = len(timesteps) - start
        self._check(timestep)
        evaluations = self._evaluations() or len(timesteps) - start
        step, steps = self._user_step(len(timesteps), evaluations)
        stepped, self._counted = self._counted != self._count, self._count
        group = min(step * time_groups // steps, time_groups - 1)
        return StepInfo(group, step, steps, evaluations, first, stepped, self._count)

    def _follow(self) -> None:
        """Watch the pipeline's new scheduler, if it was replaced."""
        now = self._source()
        if now is not self.scheduler:
            unwatch(self.scheduler, self)
            self.scheduler = now
            self.restart()
            watch(now, self)

    def _check(self, timestep: float) -> None:
        """Refuse a call at another timestep than the one at which the scheduler stands."""
        timesteps = self._on_host()
        fitting = [s for s in self._starts if _close(timesteps, s + self._count, timestep)]
        if fitting:
            self._starts = fitting
        else:
            at = self._starts[0] + self._count
            stands = timesteps[at] if at < len(timesteps) else None
            where = (
                "its run is over" if stands is None else f"it stands at {stands:g} (evaluation {at} of its schedule)"
            )
            raise ValueError(
                f"the model is called at timestep {timestep:g}, but {type(self.scheduler).__name__}, which is watched, "
                f"has stepped {self._count} times and {where}: that call is not part of its run. Trace with the "
                "scheduler that drives the loop, or unpatch() before other calls of the model"
            )

    def _on_host(self) -> list[float]:
        """Return the schedule as numbers, read once a schedule: a GPU would wait each time."""
        now = self.scheduler.timesteps
        if self._read is None or self._read[0] is not now:
            self._read = now, [self._given(float(t)) for t in (now.tolist() if hasattr(now, "tolist") else now)]
        return self._read[1]

    def _find_starts(self, timestep: float) -> list[int]:
        """Return where a run may have begun (img2img: inside the schedule), the likeliest first: at ``begin_index``, or
        where ``timestep`` stands, which may be in several places.
        """
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is not None:
            return [int(begin)]
        distance = [abs(t - timestep) for t in self._on_host()]
        nearest = [i for i, d in enumerate(distance) if d == min(distance)]
        order = getattr(self.scheduler, "order", 1)
        nearest.sort(key=lambda i: i % order != 0)  # a solver's own steps start at its order's multiples
        return [i - self._count for i in nearest]

    def _user_step(self, schedule: int, evaluations: int) -> tuple[int, int]:
        """Return (index, number) of the user's step that the running evaluation belongs to."""
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


class ViewsClock(SchedulerClock):
    """Counts the timesteps that come, of a pipeline that does not step its scheduler once an evaluation: it does so for
    every view of the picture, steps a copy for every frame, or steps twice.
    """

    def restart(self) -> None:
        super().restart()
        self._at: float | None = None

    def on_step(self, sample: object) -> None:
        pass

    def read(self, timestep: float, time_groups: int) -> StepInfo:
        self._follow()
        if getattr(self.scheduler, "order", 1) > 1:
            raise ValueError(
                f"{type(self.scheduler).__name__} evaluates a step twice, and this pipeline steps it once for every "
                "view of the picture or frame, so that the second evaluation can't be told from another one's: trace "
                "with a scheduler of order 1, such as DDIMScheduler"
            )
        self._count += self._at is not None and self._at != timestep
        self._at = timestep
        return super().read(timestep, time_groups)


def _close(timesteps: list[float], at: int, timestep: float) -> bool:
    """Tell whether a schedule stands at ``timestep`` at one of its evaluations."""
    if not 0 <= at < len(timesteps):
        return False
    return abs(timesteps[at] - timestep) <= BFLOAT16 * max(abs(timesteps[at]), abs(timestep)) + 1e-3


def read_timestep(timestep: Tensor | float) -> float:
    """Return the timestep of a model call as a number.

    Raises:
        ValueError: the samples of the batch stand at different timesteps.
    """
    if not isinstance(timestep, Tensor):
        return float(timestep)
    if timestep.numel() == 1 or not any(timestep.stride()):
        return float(timestep.flatten()[0])
    values = timestep.flatten().tolist()
    if any(value != values[0] for value in values):
        shown = ", ".join(f"{value:g}" for value in values[:8]) + (", …" if len(values) > 8 else "")
        raise ValueError(
            f"the samples of this batch stand at different timesteps ({shown}), so they belong to different time "
            "groups: "
            "trace samples of one timestep at a time"
        )
    return float(values[0])
