"""Triton kernels, kept in the top-level folder ``kernels/`` (why that folder has no ``__init__``: CONTRIBUTING.md)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))

if TYPE_CHECKING:  # a checker of types does not follow __path__

    def __getattr__(name: str) -> Any: ...
