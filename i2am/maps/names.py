"""The words that name a map, written once: directions, levels, normalisations."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Direction = Literal["r2g", "g2r", "mass"]
Axis = Literal["time", "head", "layer"]  # what a level keeps apart; None keeps nothing apart
Normalize = Literal["raw", "lift"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
AXES: tuple[Axis, ...] = get_args(Axis)
NORMALIZE: tuple[Normalize, ...] = get_args(Normalize)


class Level(NamedTuple):
    """One level: the axis that it keeps apart, and what a place on that axis is called."""

    axis: Axis | None
    one: str
    several: str


LEVELS: dict[str, Level] = {  # by the method of AttributionMaps that reads it
    "ulam": Level(None, "", ""),
    "tlam": Level("time", "time group", "time groups"),
    "hlam": Level("head", "head", "heads"),
    "llam": Level("layer", "layer", "layers"),
}


def level_of(axis: Axis | None) -> str:
    """Return the name of the level that keeps ``axis`` apart: "time" → "tlam"."""
    return next(name for name, level in LEVELS.items() if level.axis == axis)
