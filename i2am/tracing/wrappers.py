"""Models inside others that do nothing but call them."""

from __future__ import annotations

from typing import Any

WRAPPERS = {"PeftModel": "base_model.model", "DistributedDataParallel": "module"}  # class → path of what it calls


def inside(model: Any) -> Any:
    """Return the model inside PEFT's ``PeftModel`` and ``DistributedDataParallel``; any other object as it is."""
    while True:
        path = next((WRAPPERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in WRAPPERS), None)
        if path is None:
            return model
        model = model.get_submodule(path)
