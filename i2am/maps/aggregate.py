"""From token sums to maps: the one path of every level.

Mean over time → bicubic to the common grid → clamp at 0 → mean over heads → mean over layers (Park & Jang, ICLR 2025,
section 3). Where the token values come from is a source's business: running sums, registered regions, or recorded
queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.maps.entries import Entry
from i2am.maps.sram import Weights, heads_at_once, pooled
from i2am.references import Grid

Picks = int | slice | Sequence[int] | None


@dataclass(frozen=True)
class LayerSums:
    """What one layer saw of one reference. ``T`` time groups, ``Q`` generated queries, ``K`` reference keys."""

    layer: str
    reference: str
    grid: Grid  # of the Q generated tokens
    reference_grid: Grid | None  # of the last K - skip reference tokens
    skip: int
    keys: int  # all keys of the attention
    default: bool  # in the default layer set
    counts: tuple[int, ...]  # [T] calls
    r2g: Tensor  # [T, B, H, Q] float32 sums over calls
    g2r: Tensor  # [T, B, H, K]
    mass: Tensor | None = None  # [T, B, H, Q]
    sram: Tensor | None = None  # [T, B, H, R, K] of the R registered regions

    @property
    def heads(self) -> int:
        return self.r2g.shape[2]


# ---------------------------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """Where a level's token values come from."""

    name: str  # for errors

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        """``(sums [T', X, heads, N], counts [T'])`` of one layer, for the chosen time groups; ``X`` maps a head."""

    def heads_at_once(self, s: LayerSums) -> int:
        """How many heads to ask for at once, so that answers stay small."""


@dataclass(frozen=True)
class RunningSums:
    """The running sums of a direction."""

    name: str

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        return getattr(s, self.name)[times][:, :, heads], torch.tensor([s.counts[t] for t in times])

    def heads_at_once(self, s: LayerSums) -> int:
        return s.heads


@dataclass(frozen=True)
class RegisteredRegion:
    """The running sums of one registered region."""

    region: int
    name: str = "SRAM"

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        return s.sram[times][:, :, heads, self.region], torch.tensor([s.counts[t] for t in times])

    def heads_at_once(self, s: LayerSums) -> int:
        return s.heads


@dataclass(frozen=True)
class RecordedRegions:
    """Recomputed from recorded queries and keys; ``X = B·R`` for ``R`` regions."""

    entries: list[Entry]
    weights: Weights
    count: int
    reverse: bool = False
    name: str = "SRAM"

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        B, N = s.r2g.shape[1], s.r2g.shape[-1] if self.reverse else s.g2r.shape[-1]
        weights = self.weights(s.reference_grid if self.reverse else s.grid)
        if self.reverse:  # tokens off the grid have no weight
            weights = F.pad(weights, (s.skip, 0))
        if weights.shape[0] not in (1, B):
            raise ValueError(f"a mask for each of {weights.shape[0]} images, but the maps hold {B}")
        sums, counts = torch.zeros(len(times), B, self.count, len(heads), N), torch.zeros(len(times), dtype=torch.int64)
        for entry in self.entries:
            if (entry.layer, entry.reference) == (s.layer, s.reference) and entry.group in times:
                t = times.index(entry.group)
                sums[t] += pooled(entry, weights, heads, reverse=self.reverse).cpu()
                counts[t] += 1
        return sums.flatten(1, 2), counts

    def heads_at_once(self, s: LayerSums) -> int:
        return heads_at_once(self.count, s.r2g.shape[1], max(s.r2g.shape[-1], s.g2r.shape[-1]))


@dataclass
class Remembered:
    """A source that remembers its answer for the last layer, for all heads and times."""

    source: Source
    _last: tuple[LayerSums | None, Tensor | None, Tensor | None] = (None, None, None)

    @property
    def name(self) -> str:
        return self.source.name

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        if self._last[0] is not s:
            self._last = (s, *self.source.values(s, list(range(s.heads)), list(range(len(s.counts)))))
        _, sums, counts = self._last
        return sums[times][:, :, heads], counts[times]

    def heads_at_once(self, s: LayerSums) -> int:
        return s.heads


@dataclass(frozen=True)
class Levels:
    """The chosen maps, layer by layer on the common grid: what a level is a mean of."""

    direction: str
    sums: list[LayerSums]
    source: Source
    times: list[int]
    heads: Picks
    size: Grid
    lift: bool
    level: str | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """``(maps [X, G, h, w], seen [G])`` a layer; ``G`` time groups or heads at these levels, else 1.

        A map without any call is NaN, and ``seen`` is False there.
        """
        for s in self.sums:
            heads = pick(self.heads, s.heads, f"heads of {s.layer}")
            step = self.source.heads_at_once(s)
            parts = []
            for start in range(0, len(heads), step):
                sums, counts = self.source.values(s, heads[start : start + step], self.times)  # [G, X, H', N], [G]
                if self.level != "time":
                    sums, counts = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
                maps = self.ongrid_of(s, sums / counts[:, None, None, None])  # [G, X, H', h, w]; 0 / 0 is NaN
                parts.append(maps if self.level == "head" else maps.sum(2, keepdim=True))
            if self.level == "head":
                yield torch.cat(parts, dim=2)[0], (counts > 0).expand(len(heads))
            else:
                yield (sum(parts) / len(heads))[:, :, 0].transpose(0, 1), counts > 0

    def mean_layers(self) -> Tensor:
        """``[X, G, h, w]``: the mean over the layers that ran."""
        total, ran = 0.0, 0
        for maps, seen in self:
            total = total + torch.where(seen[:, None, None], maps, 0.0)
            ran = ran + seen
        return total / ran[:, None, None]

    def ongrid_of(self, s: LayerSums, x: Tensor) -> Tensor:
        """``[..., N]`` token values → ``[..., h, w]`` on the common grid, not negative."""
        h, w = grid_of(s, self.direction)
        if self.direction == "g2r":
            scale, x = s.keys, x[..., s.skip :]
        else:
            scale = x.shape[-1] if self.direction == "r2g" else s.keys / s.g2r.shape[-1]
        x = x * scale if self.lift else x
        grids = x.reshape(-1, 1, h, w)
        if (h, w) != self.size:
            grids = F.interpolate(grids, self.size, mode="bicubic", align_corners=False)
        return grids.clamp_min(0).reshape(*x.shape[:-1], *self.size)


def grid_of(s: LayerSums, direction: str) -> Grid:
    return s.reference_grid if direction == "g2r" else s.grid


def area(grid: Grid) -> int:
    return grid[0] * grid[1]


def check_direction(direction: str, sums: list[LayerSums], source: Source | None) -> None:
    if direction == "g2r":
        check_reference_grid(sums[0], "G2R" if source is None else source.name)
    if direction == "mass" and any(s.mass is None for s in sums):
        raise ValueError(
            f"no mass for reference {sums[0].reference!r}: its tokens are all the keys there are, so it is 1"
        )


def check_reference_grid(s: LayerSums, what: str) -> None:
    if s.g2r.shape[-1] == 1:
        raise ValueError(
            f"no {what} for reference {s.reference!r}: it is one token, and a softmax over one key is identically 1. "
            "R2G, which normalises over the generated tokens, is still a map: use 'r2g'"
        )
    if s.reference_grid is None:
        raise ValueError(
            f"no {what} for reference {s.reference!r}: its {s.g2r.shape[-1]} tokens have no 2-D layout (pooled or "
            "resampled); pass Reference(grid=(h, w)) if they do, or use 'r2g'"
        )


def check_heads(sums: list[LayerSums]) -> None:
    if len({s.heads for s in sums}) > 1:
        listing = ", ".join(f"{s.layer}: {s.heads}" for s in sums)
        raise ValueError(f"head maps need layers of equal head count, choose with layers=; there are {listing}")


def pick(picks: Picks, length: int, name: str) -> list[int]:
    """Chosen indices as a list; refuses what is outside."""
    if picks is None:
        return list(range(length))
    if isinstance(picks, slice):
        chosen = list(range(length))[picks]
    else:
        chosen = [picks] if isinstance(picks, int) else [int(i) for i in picks]
    wrong = [i for i in chosen if not -length <= i < length]
    if wrong or not chosen:
        raise IndexError(f"{name}={picks} picks {wrong[0] if wrong else 'nothing'} from 0…{length - 1}")
    return [i % length for i in chosen]
