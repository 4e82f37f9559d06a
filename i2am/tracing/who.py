"""Who calls a traced model: the traced pipeline, in its own call on this thread, or somebody else."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor

from i2am.tracing.wrappers import inside

PIPELINES = ("DiffusionPipeline", "ModularPipeline")  # names of classes whose calls run a model
LIBRARY = ("/torch/nn/modules/", "/torch/_dynamo/", "/torch/utils/_contextlib")  # frames that are no pipeline's


class Caller(NamedTuple):
    """Caller of a model."""

    ours: bool
    why: str = ""  # it is not
    frame: FrameType | None = None  # of the pipeline's call


class PipelineCaller:
    """Tells calls that the traced pipeline makes from those of others: siblings of ``from_pipe``, callbacks, loops.

    Args:
        pipe: the traced pipeline.
    """

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._run: tuple[int, int] | None = None  # thread and id of the frame of the run that counts
        self._timesteps: object = None  # that it goes over

    def who(self) -> Caller:
        """Return who calls, seen from a hook of the model."""
        name = type(self._pipe).__name__
        frame, other = self._running()
        if frame is None:
            if other is not None:
                return Caller(False, f"calls of another pipeline, {other}: trace that one")
            return Caller(
                False,
                f"calls that {name} did not make itself: trace a loop of your own with i2am.patch_unet or "
                "i2am.patch_transformer(model, scheduler=...)",
            )
        run = threading.get_ident(), id(frame)
        if self._run is not None and self._run[0] != run[0] and _executing(*self._run, code=frame.f_code):
            return Caller(False, f"calls of {name} in another thread, while it ran in the one that is traced")
        self._run = run
        return Caller(True, frame=frame)

    def same_call(self, frame: FrameType | None) -> bool:
        """Return whether a pipeline's call is the one of the last time: it goes over the very same timesteps."""
        now = None if frame is None else frame.f_locals.get("timesteps")
        same, self._timesteps = now is not None and now is self._timesteps, now
        return same

    def _running(self) -> tuple[FrameType | None, str | None]:
        """Return the frame of the traced pipeline's call, or else the name of the innermost other pipeline."""
        frame: FrameType | None = sys._getframe(1)
        other: str | None = None
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_varnames[0] == "self" and not any(x in code.co_filename for x in LIBRARY):
                caller = frame.f_locals.get("self")
                if caller is self._pipe:
                    return (frame, None) if other is None else (None, other)
                pipeline = other is None and any(kind.__name__ in PIPELINES for kind in type(caller).__mro__)
                if pipeline and not any(part is caller for part in vars(self._pipe).values()):  # of a combined one
                    other = type(caller).__name__
            frame = frame.f_back
        return None, other


class ThreadCaller:
    """Tells calls of the tracer's thread from those of others, for a model without a pipeline.

    The tracer's thread is the one that made it; until that one calls the model, the first other one that does.
    """

    def __init__(self) -> None:
        self._maker = threading.current_thread()
        self._user: threading.Thread | None = None

    def who(self) -> Caller:
        """Return who calls, seen from a hook of the model."""
        now = threading.current_thread()
        if self._user is None or not self._user.is_alive():
            self._user = now
        if now is self._user:
            return Caller(True)
        return Caller(False, f"calls in thread {now.name}, while {self._user.name} is the one that is traced")

    def same_call(self, frame: FrameType | None) -> bool:
        """Return False: a loop of one's own may begin anew at any time."""
        return False

    @property
    def taken_over(self) -> bool:
        """True where the thread that made the tracer calls the model for the first time, after another one has."""
        now = threading.current_thread()
        if now is not self._maker or self._user is None or self._user is now:
            return False
        self._user = now
        return True


def calling_pipeline() -> Any:
    """Return the innermost pipeline whose method is on this thread's stack, seen from a hook of its model; or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and not any(x in code.co_filename for x in LIBRARY):
            caller = frame.f_locals.get("self")
            if any(kind.__name__ in PIPELINES for kind in type(caller).__mro__):
                return caller
        frame = frame.f_back
    return None


def local_of_call(pipe: Any, name: str) -> Any:
    """Return a local variable of the running ``__call__`` of ``pipe`` on this thread; None: there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and name in code.co_varnames and frame.f_locals.get("self") is pipe:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def images_of_call(pipe: Any) -> int | None:
    """Return how many pictures the running ``__call__`` of ``pipe`` denoises; None: it does not say."""
    latents = local_of_call(pipe, "latents")
    return latents.shape[0] if isinstance(latents, Tensor) else None


def replaced(pipe: Any, model: Any) -> str:
    """Say that a pipeline runs another model now than the one that is traced, if it does."""
    parts = [] if pipe is None else list(vars(pipe).values())
    own = [part for p in parts if hasattr(p, "components") for part in vars(p).values()]  # of a combined pipeline's
    if pipe is None or any(inside(part) is model for part in [*parts, *own]):
        return ""
    return (
        f" ({type(pipe).__name__} no longer has the {type(model).__name__} that is traced: trace it after its model is "
        "set)"
    )


def _executing(thread: int, frame_id: int, code: object) -> bool:
    """Tell whether a frame is still on a thread's stack."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if id(frame) == frame_id and frame.f_code is code:
            return True
        frame = frame.f_back
    return False
