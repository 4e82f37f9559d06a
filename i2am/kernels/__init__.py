"""Triton kernels, kept in the top-level folder ``kernels/`` (why that folder has no ``__init__``: CONTRIBUTING.md)."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
