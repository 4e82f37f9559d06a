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
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.layout import Grid, LayerFilter, choose_layers
from i2am.maps import AttributionMaps

MAP_SIDE = 64  # tokens: finer maps are averaged, the picture shows no more

Pick = tuple[int | None, int | None, int | None]
Ask = Callable[..., Tensor]


@dataclass(frozen=True)
class Axes:
    """What can be picked."""

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
        """How many picks fix at most ``order`` of the three."""
        T, H, L = self.times, self.heads, len(self.layers)
        return sum([1, T + H + L, T * H + T * L + H * L, T * H * L][: order + 1])


@dataclass(frozen=True)
class Plan:
    """How much of the attention's rows a report holds."""

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
        """Keeps ``[h, w]`` between its minimum and maximum; returns where."""
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        at = self._append(scaled)
        return {"at": at, "grid": list(values.shape), "low": low, "high": high}

    def add_rows(self, values: np.ndarray) -> dict[str, Any]:
        """Keeps ``[cells, h, w]``, each row between 0 and its maximum; returns where."""
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
        """Both streams, deflated, as base64."""
        floats = np.concatenate([*self.floats, np.zeros(0, np.float32)]).astype("<f4")
        raw = {"bytes": np.concatenate(self.bytes).tobytes(), "floats": floats.tobytes()}
        return {name: b64encode(zlib.compress(data, 9)).decode() for name, data in raw.items()}


def choose_plan(
    maps: AttributionMaps, axes: Axes, reference: str, budget: float, detail: int | None, asked: bool
) -> tuple[Plan, dict[str, Grid]]:
    """The richest plan of which maps and rows fit ``budget`` bytes, and its cells on both images.

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
    """``grid`` with at most ``side`` on its longer side, of the same shape."""
    longer = max(grid)
    return grid if longer <= side else tuple(max(round(n * side / longer), 1) for n in grid)


def picked(ask: Ask, axes: Axes, order: int) -> Iterator[tuple[Pick, np.ndarray]]:
    """Every pick of at most ``order``, with its maps ``[..., h, w]``; picks in which nothing ran are left out.

    Args:
        ask: ``ask(level, layers=, times=)`` → ``[...]`` or, at a level, ``[..., G, h, w]``. A layer is read on its own
            grid.
    """
    names, everything = axes.layers, list(axes.layers)
    first = iter([((None, None, None), ask(None, layers=everything))])
    for pick, values in chain(first, _singles(ask, axes, everything, order), _combined(ask, axes, names, order)):
        if values.isfinite().all():
            yield pick, values.numpy()


def _singles(ask: Ask, axes: Axes, everything: list[str], order: int) -> Iterator[tuple[Pick, Tensor]]:
    if order < 1:
        return
    yield from (((t, None, None), x) for t, x in enumerate(_groups(ask("time", layers=everything))))
    if axes.heads:
        yield from (((None, h, None), x) for h, x in enumerate(_groups(ask("head", layers=everything))))
    yield from (((None, None, i), ask(None, layers=name)) for i, name in enumerate(axes.layers))


def _combined(ask: Ask, axes: Axes, names: tuple[str, ...], order: int) -> Iterator[tuple[Pick, Tensor]]:
    if order >= 2 and axes.heads:
        for t in range(axes.times):
            maps = _groups(ask("head", layers=list(names), times=t))
            yield from (((t, h, None), x) for h, x in enumerate(maps))
    for i, name in enumerate(names if order >= 2 else ()):
        yield from (((t, None, i), x) for t, x in enumerate(_groups(ask("time", layers=name))))
        if not axes.heads:
            continue
        yield from (((None, h, i), x) for h, x in enumerate(_groups(ask("head", layers=name))))
        for t in range(axes.times if order >= 3 else 0):
            yield from (((t, h, i), x) for h, x in enumerate(_groups(ask("head", layers=name, times=t))))


def readings(axes: Axes, order: int) -> int:
    """How often :func:`picked` asks."""
    H, L, T = bool(axes.heads), len(axes.layers), axes.times
    return sum([1, 1 + H + L, H * T + L + H * L, H * T * L][: order + 1])


def _groups(maps: Tensor) -> list[Tensor]:
    return list(maps.unbind(-3))


def key(pick: Pick) -> str:
    """A pick as the page writes it: ``"0,*,3"``."""
    return ",".join("*" if n is None else str(n) for n in pick)


def level_maps(maps: AttributionMaps, axes: Axes, direction: str, order: int, index: int, arrays: Arrays, **options):
    """A direction's maps for every pick, kept in ``arrays``: ``{pick: where}``.

    Raises:
        ValueError: there is no such map, as the maps say.
    """

    read = {None: maps.ulam, "time": maps.tlam, "head": maps.hlam}

    def ask(level: str | None, **chosen) -> Tensor:
        return read[level](direction, **chosen, **options)[index]

    return {key(pick): arrays.add_map(shrunk(x, MAP_SIDE)) for pick, x in picked(ask, axes, order)}


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
    """Rows of the attention for every pick: SRAM of each cell of ``grid``, or the reverse.

    Args:
        tick: called for every reading, for a progress bar.
    """

    def ask(level: str | None, **chosen) -> Tensor:
        found = maps.correspondence(grid, level=level, reverse=reverse, **chosen, **options)[index]
        tick()
        return found

    slices = {}
    for pick, values in picked(ask, axes, plan.order):
        slices[key(pick)] = arrays.add_rows(shrunk(values, plan.side))
    return {"cells": list(grid), "slices": slices}


def shrunk(values: np.ndarray, side: int) -> np.ndarray:
    """``[..., h, w]`` averaged to at most ``side`` on the longer side."""
    size = fitted(values.shape[-2:], side)
    if size == values.shape[-2:]:
        return values
    x = torch.from_numpy(values).reshape(-1, 1, *values.shape[-2:])
    return F.interpolate(x, size, mode="area").reshape(*values.shape[:-2], *size).numpy()


def _area(grid: Grid) -> int:
    return grid[0] * grid[1]
