"""Arguments of a module's forward, whether they were given by position or by name, and a module's own attributes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

_MISSING = object()


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = _MISSING) -> Any:
    """Return an argument given by position or by name."""
    if len(args) > position:
        return args[position]
    if default is _MISSING:
        return kwargs[name]
    return kwargs.get(name, default)


def argument_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = _MISSING
) -> Any:
    """Return an argument of a module's forward; by its place in its class's signature, if the name is there.

    Raises:
        ValueError: it was not given, and has no default.
    """
    names = [p for p in _signature(type(module).forward).parameters if p != "self"]
    position = names.index(name) if name in names else position
    if default is _MISSING and len(args) <= position and name not in kwargs:
        raise ValueError(
            f"{type(module).__name__} was called without {name} (its forward takes {', '.join(names)}): it is not "
            "called as diffusers' models are, so trace it with i2am.patch_modules(model, layers=…, reference=…)"
        )
    return argument(args, kwargs, position, name, default)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all given arguments of a module's forward by the names in its class's signature."""
    return dict(_signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments)


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def attribute(module: nn.Module, path: str) -> Any:
    """Return an attribute of a module by its path ("config.patch_size"); to a type checker all are Tensor | Module."""
    return attrgetter(path)(module)


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among some arguments, those in lists and dicts too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += tensors_of(value.values())
        elif isinstance(value, (list, tuple)):
            found += tensors_of(value)
    return found
