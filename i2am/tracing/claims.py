"""Which models are being traced, by whom."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from i2am.tracing import hooks
from i2am.tracing.wrappers import inside

if TYPE_CHECKING:
    from i2am.tracing.tracer import Tracer

logger = logging.getLogger("i2am")

_tracers: weakref.WeakKeyDictionary[nn.Module, Tracer] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def claim(model: nn.Module, tracer: Tracer) -> None:
    """Register ``model`` as traced by ``tracer``. A tracer that nobody holds in a with statement makes way.

    Raises:
        ValueError: a with statement holds the other tracer.
    """
    with _lock:
        other = _tracers.get(model)
    if other is not None and other.entered:
        raise ValueError(
            f"this {type(model).__name__} is being traced already: unpatch() the other tracer first, or "
            "i2am.unpatch(model)"
        )
    if other is not None:
        logger.warning("i2am: another tracer of this %s is ended, and this one takes over", type(model).__name__)
        other.unpatch()
    hooks.remove(None, model)  # what a copy of a traced model has inherited
    with _lock:
        _tracers[model] = tracer


def release(model: nn.Module, tracer: Tracer) -> None:
    """Forget that ``tracer`` traces ``model``. Idempotent."""
    with _lock:
        if _tracers.get(model) is tracer:
            del _tracers[model]


def unpatch(target: Any) -> bool:
    """End whatever traces a model or a pipeline: no hook, no replaced function stays.

    Args:
        target: a model, or a pipeline whose denoiser may be traced.

    Returns: whether something was tracing it.
    """
    target = inside(target)
    with _lock:
        found = [
            tracer
            for model, tracer in _tracers.items()
            if model is target
            or (tracer.pipe is target)
            or any(inside(part) is model for part in getattr(target, "components", {}).values())
        ]
    for tracer in found:
        tracer.unpatch()
    if isinstance(target, nn.Module):
        hooks.remove(None, target)
    return bool(found)
