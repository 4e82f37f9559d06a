"""Module hooks that belong to one tracer and one model object, and leave nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from i2am.tracing.intercept import eager


class Hook:
    """A forward hook of one module. A copy or pickle of the module carries a hook that does nothing.

    Args:
        owner: the tracer; None: does nothing.
        module: the very module that it acts on.
        function: what it calls, with torch's arguments of a hook.
    """

    def __init__(
        self, owner: object = None, module: nn.Module | None = None, function: Callable[..., Any] | None = None
    ):
        self.owner = owner
        self.function = function
        self._module = None if module is None else weakref.ref(module)

    @eager
    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self.function is None or self._module is None or self._module() is not module:
            return None
        return self.function(module, *args)

    def __copy__(self) -> Hook:
        return Hook()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def before(owner: object, module: nn.Module, function: Callable[..., Any]) -> None:
    """Call ``function(module, args, kwargs)`` before each forward of ``module``."""
    module.register_forward_pre_hook(Hook(owner, module, function), with_kwargs=True)


def after(owner: object, module: nn.Module, function: Callable[..., Any], *, always: bool = False) -> None:
    """Call ``function(module, args, output)`` after each forward of ``module``; ``always``: even if it raised."""
    module.register_forward_hook(Hook(owner, module, function), always_call=always)


def remove(owner: object, model: nn.Module) -> None:
    """Take every hook of ``owner`` off ``model``, and hooks that a copy has inherited. Idempotent."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            mine = [i for i, hook in list(hooks.items()) if isinstance(hook, Hook) and hook.owner in (owner, None)]
            for i in mine:
                hooks.pop(i, None)
                module._forward_pre_hooks_with_kwargs.pop(i, None)
                module._forward_hooks_with_kwargs.pop(i, None)
                module._forward_hooks_always_called.pop(i, None)
