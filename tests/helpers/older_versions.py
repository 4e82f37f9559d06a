"""What a diffusers older than the one of constraints.txt lacks: tests that need it skip with the reason.

With the pinned version or a newer one nothing here is in force, so that a misspelt name fails.
"""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
from packaging.version import Version

PINS = Path(__file__).parents[2] / "constraints.txt"
PINNED = re.search(r"^diffusers==([\d.]+)", PINS.read_text(encoding="utf-8"), re.MULTILINE)[1]
OLDER = Version(diffusers.__version__) < Version(PINNED)


def reason(name: str) -> str:
    return f"diffusers {diffusers.__version__} has no {name}"


class _Missing(type):
    """A class that diffusers does not have yet: whoever makes an object of it skips."""

    def __call__(cls, *args, **kwargs):
        pytest.skip(reason(cls.__name__))

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(reason(cls.__name__))


def known(kind: type) -> type:
    """Return a class of diffusers; skip where it has none of that name yet."""
    if isinstance(kind, _Missing):
        pytest.skip(reason(kind.__name__))
    return kind


def stand_in_for_missing_classes() -> None:
    """Let ``from diffusers import Flux2Pipeline`` succeed at collection."""
    lazy = type(diffusers)
    found = lazy.__getattr__

    def __getattr__(module, name):
        try:
            return found(module, name)
        except AttributeError:
            if module is not diffusers or not name[:1].isupper():
                raise
            return _Missing(name, (), {})

    lazy.__getattr__ = __getattr__


def skip_if_older(error: BaseException | None) -> None:
    """Skip when a test failed since a module or class of diffusers is not there yet."""
    if isinstance(error, ImportError) and (error.name or "").startswith("diffusers"):
        name = re.search(r"cannot import name '(\w+)'", str(error))
        pytest.skip(reason(name[1] if name else error.name))
