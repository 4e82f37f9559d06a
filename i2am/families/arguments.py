"""Arguments of a module's forward, whether they were given by position or by name."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

_MISSING = object()


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = _MISSING) -> Any:
    """Return an argument given by position or by name."""
    if len(args) > position:
        return args[position]
    if default is _MISSING:
        return kwargs[name]
    return kwargs.get(name, default)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all given arguments of a module's forward by the names in its class's signature."""
    return dict(_signature(type(module)).bind_partial(module, *args, **kwargs).arguments)


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)
