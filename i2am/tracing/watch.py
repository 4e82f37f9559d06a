"""Schedulers and samplers that are watched: their class is wrapped, never the object, of which no copy tells then."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Watcher(Protocol):
    """One that is told of a scheduler's calls."""

    def on_step(self, sample: object) -> None:
        """Note that ``sample`` was stepped."""

    def on_set_timesteps(self) -> None:
        """Note that a run begins."""


_lock = threading.Lock()
_watched: dict[int, tuple[Any, list[Watcher]]] = {}  # id(scheduler) → it and who follows it
_replaced: dict[tuple[type, str], tuple[Any, Any]] = {}  # class and method → (ours, the class's own or None)


def methods_of(scheduler: Any) -> dict[str, tuple[str, int] | None]:
    """Return a scheduler's methods that are watched → the argument, by name and position, that is stepped; None: the
    method begins a run. Of CompVis' samplers these are ``p_sample_…`` and ``make_schedule``.
    """
    if is_sampler(scheduler):
        steps = (name for name in dir(type(scheduler)) if name.startswith("p_sample"))
        return {**dict.fromkeys(steps, ("x", 0)), "make_schedule": None}
    return {"step": ("sample", 2), "set_timesteps": None}


def is_sampler(scheduler: Any) -> bool:
    """Return whether this is a sampler of CompVis' kind (``PLMSSampler``, ``DDIMSampler``)."""
    kind = type(scheduler)
    return hasattr(kind, "make_schedule") and any(name.startswith("p_sample") for name in dir(kind))


def watch(scheduler: Any, watcher: Watcher) -> None:
    """Tell ``watcher`` of each call of the scheduler's methods."""
    kind = type(scheduler)
    with _lock:
        _watched.setdefault(id(scheduler), (scheduler, []))[1].append(watcher)
        for name, sample in methods_of(scheduler).items():
            if (kind, name) not in _replaced:
                ours = _telling(sample, getattr(kind, name))
                _replaced[kind, name] = ours, vars(kind).get(name)
                setattr(kind, name, ours)


def unwatch(scheduler: Any, watcher: Watcher) -> None:
    """Tell ``watcher`` no more. Idempotent."""
    kind = type(scheduler)
    with _lock:
        _, watchers = _watched.get(id(scheduler), (None, []))
        if watcher in watchers:
            watchers.remove(watcher)
        if not watchers:
            _watched.pop(id(scheduler), None)
        if any(type(s) is kind for s, _ in _watched.values()):
            return
        for name in methods_of(scheduler):
            ours, own = _replaced.pop((kind, name), (None, None))
            if ours is None or vars(kind).get(name) is not ours:  # else someone replaced it after us
                continue
            if own is None:
                delattr(kind, name)
            else:
                setattr(kind, name, own)


def _telling(sample: tuple[str, int] | None, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``method`` of a scheduler's class: it tells the watchers of a watched object that it has run."""

    @functools.wraps(method)  # pipelines read the signature (`eta`, `generator`, …)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        scheduler, watchers = _watched.get(id(self), (None, ()))
        if scheduler is self:
            for watcher in list(watchers):
                if sample is None:
                    watcher.on_set_timesteps()
                else:
                    name, position = sample
                    watcher.on_step(kwargs.get(name, args[position] if len(args) > position else None))
        return result

    return wrapper
