"""A value of a file's header that knows its place: what a reader of untrusted files asks for its type."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from i2am.references import Grid

LONGEST = 80  # characters of a file's own text in an error


@dataclass(frozen=True)
class Field:
    """A value of a file's header, with its place: every refusal names both."""

    file: Path
    name: str
    value: Any
    key: str = ""  # in the object that holds it

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.file}: {self.name} {what}; it is {shown(self.value)}")

    def mapping(self, required: Iterable[str] = (), optional: Iterable[str] | None = None) -> Iterator[Field]:
        """Yield the fields of an object; with ``optional``, only these and the required ones may be there."""
        required = tuple(required)
        if not isinstance(self.value, dict):
            self.refuse("must be an object")
        for key in required:
            if key not in self.value:
                self.refuse(f"has no field {key!r}")
        for key, value in self.value.items():
            if optional is not None and key not in required and key not in optional:
                self.refuse(f"has a field that this format does not know, {shown(key)}")
            place = key if len(key) <= LONGEST else key[: LONGEST - 1] + "…"
            yield Field(self.file, place if self.name == "header" else f"{self.name}.{place}", value, key)

    def fields(self, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Field]:
        return {field.key: field for field in self.mapping(required, tuple(optional))}

    def items(self, least: int = 0, exactly: int | None = None) -> list[Field]:
        if not isinstance(self.value, list):
            self.refuse("must be a list")
        if len(self.value) < least or (exactly is not None and len(self.value) != exactly):
            self.refuse(f"must have {f'{least} or more' if exactly is None else exactly} entries")
        return [Field(self.file, f"{self.name}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("must be a string")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.refuse("must be true or false")
        return self.value

    def integer(self, least: int) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not least <= self.value < 2**63:
            self.refuse(f"must be an integer of at least {least}")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not _finite(self.value):
            self.refuse("must be a finite number")
        return float(self.value)

    def grid(self) -> Grid:
        h, w = (side.integer(1) for side in self.items(exactly=2))
        return h, w


def shown(value: Any) -> str:
    """Return a value as an error shows it: cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
