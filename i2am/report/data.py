"""What a report holds: maps and rows for every choice of time group, head and layer, as bytes within a budget.

A *pick* fixes a time group, a head and a layer, each or none of them: ``(time, head, layer)``. Rows of the attention
(SRAM of each cell of a grid, and its reverse) are what takes room, so a plan is chosen before anything is computed:
how many of the three a pick may fix at once, and how fine the cells are.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.maps import AttributionMaps
from i2am.references import Grid, LayerFilter, choose_layers

MAP_SIDE = 64  # tokens: finer maps are averaged, the picture shows no more

Pick = tuple[int | None, int | None, int | None]
Ask = Callable[..., Tensor]


@dataclass(frozen=True)
class Axes:
    """Axes of the maps along which one can pick."""

    times: int
    heads: int  # 0: the layers' head counts differ
    layers: tuple[str, ...]

    @classmethod
    def of(cls, maps: AttributionMaps, reference: str, layers: LayerFilter) -> Axes:
        heads = maps.heads(reference)
        chosen = [n for n in maps.layers if n in heads] if layers is None else choose_layers(heads, layers)
        counts = {heads[name] for name in chosen}
        return cls(maps.time_groups, counts.pop() if len(counts) == 1 else 0, tuple(chosen))

    def count(self, order: int) -> int:
        """Count the picks that fix at most ``order`` of the three."""
        T, H, L = self.times, self.heads, len(self.layers)
        return sum([1, T + H + L, T * H + T * L + H * L, T * H * L][: order + 1])


@dataclass(frozen=True)
class Plan:
    """Amount of the attention's rows that a report holds."""

    order: int  # how many of time, head and layer may be picked at once
    cells: int  # on the longer side of the generated image
    side: int  # tokens of a stored row, on the longer side


PLANS = (
    Plan(3, 16, 32),
    Plan(3, 16, 16),
    Plan(2, 16, 32),
    Plan(2, 16, 16),
    Plan(2, 12, 16),
    Plan(1, 16, 32),
    Plan(1, 16, 16),
    Plan(1, 12, 16),
    Plan(1, 8, 16),
    Plan(0, 16, 16),
    Plan(0, 8, 8),
)
BARE_PLANS = tuple(Plan(order, 0, 0) for order in (3, 2, 1, 0))  # maps only


@dataclass
class Arrays:
    """The arrays of a report: 8-bit values with the scale of each row."""

    bytes: list[np.ndarray] = field(default_factory=list)
    floats: list[np.ndarray] = field(default_factory=list)
    _ends: list[int] = field(default_factory=lambda: [0, 0])

    def add_map(self, values: np.ndarray) -> dict[str, Any]:
        """Keep ``[h, w]`` between its minimum and maximum; return where."""
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        at = self._append(scaled)
        return {"at": at, "grid": list(values.shape), "low": low, "high": high}

    def add_rows(self, values: np.ndarray) -> dict[str, Any]:
        """Keep ``[cells, h, w]``, each row between 0 and its maximum; return where."""
        peaks = values.max((1, 2)).astype(np.float32)
        at = self._append(values / np.maximum(peaks, np.finfo(np.float32).tiny)[:, None, None] * 255)
        self.floats.append(peaks)
        self._ends[1] += len(peaks)
        return {"at": at, "grid": list(values.shape[1:]), "peaks": self._ends[1] - len(peaks)}

    def _append(self, scaled: np.ndarray) -> int:
        self.bytes.append(np.rint(scaled).astype(np.uint8).ravel())
        self._ends[0] += scaled.size
        return self._ends[0] - scaled.size

    def packed(self) -> dict[str, str]:
        """Return both streams, deflated, as base64."""
        floats = np.concatenate([*self.floats, np.zeros(0, np.float32)]).astype("<f4")
        raw = {"bytes": np.concatenate(self.bytes).tobytes(), "floats": floats.tobytes()}
        return {name: b64encode(zlib.compress(data, 9)).decode() for name, data in raw.items()}


def choose_plan(
    maps: AttributionMaps, axes: Axes, reference: str, budget: float, detail: int | None, asked: bool
) -> tuple[Plan, dict[str, Grid]]:
    """Choose the richest plan of which maps and rows fit ``budget`` bytes, and its cells on both images.

    Args:
        detail: at most so many of time, head and layer at once.
        asked: whether there are rows at all; without, a plan has no cells.
    """
    generated, seen = _finest(maps, axes, reference) if asked else ((1, 1), (1, 1))
    for plan in PLANS if asked else BARE_PLANS:
        cells = {"generated": fitted(generated, plan.cells), "reference": fitted(seen, plan.cells)} if asked else {}
        row = {"generated": fitted(seen, plan.side), "reference": fitted(generated, plan.side)}
        a_pick = 3 * MAP_SIDE**2 + sum((4 + _area(row[side])) * _area(cells[side]) for side in cells)
        if a_pick * axes.count(plan.order) <= budget and (detail is None or plan.order <= detail):
            return plan, cells
    return (BARE_PLANS[-1], {}) if not asked else choose_plan(maps, axes, reference, budget, detail, False)


def _finest(maps: AttributionMaps, axes: Axes, reference: str) -> tuple[Grid, Grid]:
    generated = max((maps.grids(reference)[name] for name in axes.layers), key=_area)
    return generated, tuple(maps.ulam("g2r", reference=reference, layers=list(axes.layers)).shape[-2:])


def fitted(grid: Grid, side: int) -> Grid:
    """Return ``grid`` with at most ``side`` on its longer side, of the same shape."""
    longer = max(grid)
    return grid if longer <= side else tuple(max(round(n * side / longer), 1) for n in grid)


def picked(
    ask: Ask, axes: Axes, order: int, size: Grid, side: int, tick: Callable[[], Any] = lambda: None
) -> Iterator[tuple[Pick, np.ndarray]]:
    """Yield every pick of at most ``order``, with its maps ``[..., h, w]``; picks in which nothing ran are left out.

    Goes through the layers once: a layer's own picks are on its own grid; what has no layer picked is the mean over
    layers on the common grid, the last step of every level.

    Args:
        ask: ``ask(level, layers=, times=, size=)`` → ``[...]`` or, at a level, ``[..., G, h, w]``.
        size: the common grid.
        side: tokens on the longer side that are kept; finer maps are averaged.
        tick: called after every layer.
    """
    totals: dict[Pick, np.ndarray] = {}
    ran: dict[Pick, int] = {}
    for i, name in enumerate(axes.layers):
        for t, h, own in _of_layer(ask, axes, order - 1, layers=name):
            yield (t, h, i), shrunk(own, side)
        for t, h, common in _of_layer(ask, axes, order, layers=name, size=size):
            pick, values = (t, h, None), shrunk(common, side)
            totals[pick] = totals[pick] + values if pick in totals else values
            ran[pick] = ran.get(pick, 0) + 1
        tick()
    yield from ((pick, total / ran[pick]) for pick, total in totals.items())


def _of_layer(ask: Ask, axes: Axes, order: int, **options) -> Iterator[tuple[int | None, int | None, np.ndarray]]:
    """Yield (time group, head, maps) of one layer, at most ``order`` of the two fixed; only what ran."""
    found: list[tuple[int | None, int | None, Tensor]] = []
    heads = range(axes.heads)
    if order >= 0:
        found.append((None, None, ask(None, **options)))
    if order >= 1:
        found += [(t, None, x) for t, x in enumerate(ask("time", **options).unbind(-3))]
        found += zip([None] * axes.heads, heads, ask("head", **options).unbind(-3), strict=True) if heads else ()
    if order >= 2 and heads:
        for t in range(axes.times):
            found += zip([t] * axes.heads, heads, ask("head", times=t, **options).unbind(-3), strict=True)
    yield from ((t, h, x.numpy()) for t, h, x in found if x.isfinite().all())


def key(pick: Pick) -> str:
    """Write a pick as the page does: ``"0,*,3"``."""
    return ",".join("*" if n is None else str(n) for n in pick)


def level_maps(
    maps: AttributionMaps, axes: Axes, direction: str, order: int, index: int, arrays: Arrays, **options
) -> dict[str, Any]:
    """Put a direction's maps for every pick into ``arrays``: ``{pick: where}``.

    Raises:
        ValueError: there is no such map, as the maps say.
    """
    read = {None: maps.ulam, "time": maps.tlam, "head": maps.hlam}

    def ask(level: str | None, **chosen) -> Tensor:
        return read[level](direction, **chosen, **options)[index]

    size = tuple(ask(None, layers=list(axes.layers)).shape[-2:])
    return {key(pick): arrays.add_map(x) for pick, x in picked(ask, axes, order, size, MAP_SIDE)}


def rows(
    maps: AttributionMaps,
    axes: Axes,
    grid: Grid,
    plan: Plan,
    index: int,
    arrays: Arrays,
    tick: Callable[[], Any],
    *,
    reverse: bool,
    **options,
) -> dict[str, Any]:
    """Return rows of the attention for every pick: SRAM of each cell of ``grid``, or the reverse.

    Args:
        tick: called after every layer, for a progress bar.
    """
    answer = maps.correspondences(grid, reverse=reverse)

    def ask(level: str | None, **chosen) -> Tensor:
        return answer(level=level, **chosen, **options)[index]

    direction = "r2g" if reverse else "g2r"
    size = tuple(maps.ulam(direction, layers=list(axes.layers), **options).shape[-2:])
    found = picked(ask, axes, plan.order, size, plan.side, tick)
    return {"cells": list(grid), "slices": {key(pick): arrays.add_rows(values) for pick, values in found}}


def shrunk(values: np.ndarray, side: int) -> np.ndarray:
    """Average ``[..., h, w]`` to at most ``side`` on the longer side."""
    size = fitted(values.shape[-2:], side)
    if size == values.shape[-2:]:
        return values
    x = torch.from_numpy(values).reshape(-1, 1, *values.shape[-2:])
    return F.interpolate(x, size, mode="area").reshape(*values.shape[:-2], *size).numpy()


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]
