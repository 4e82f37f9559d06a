"""From token sums to maps: the one path of every level.

Mean over time → bicubic to the common grid → clamp at 0 → mean over heads → mean over layers (Park & Jang, ICLR 2025,
section 3). Where the token values come from is a source's business: running sums, registered regions, or recorded
queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.maps.entries import QKEntry
from i2am.maps.names import Axis, Direction
from i2am.maps.sram import RegionOnGrid, heads_at_once, rows_of_calls
from i2am.ops.results import Sums
from i2am.references import Grid, Kind

Picks = int | slice | Sequence[int] | None
STORED = ("r2g", "g2r", "mass", "sram")  # the tensors of LayerSums


@dataclass(frozen=True)
class LayerSums:
    """Sums of one layer over one reference, running or read from a file.

    ``T`` time groups, ``Q`` generated queries, ``K`` reference keys.
    """

    layer: str
    reference: str
    grid: Grid  # of the Q generated tokens
    reference_grid: Grid | None  # of the last K - skip reference tokens
    skip: int
    keys: int  # all keys of the attention: what lift multiplies G2R by; scaled by X / K with rollout
    default: bool  # in the default layer set
    counts: list[int] | tuple[int, ...]  # [T] calls; a list while they run
    r2g: Tensor  # [T, B, H, Q] float32 sums over calls
    g2r: Tensor  # [T, B, H, K]
    mass: Tensor | None = None  # [T, B, H, Q]
    sram: Tensor | None = None  # [T, B, H, R, K] of the R registered regions
    kind: Kind = "reference"  # what the keys are
    queries: int | None = None  # of one call, by which lift multiplies R2G; None: Q (fewer where calls are tiles)

    def count(self, group: int) -> None:
        """Note one more call in a time group."""
        assert isinstance(self.counts, list), "these sums are frozen"
        self.counts[group] += 1

    def at(self, group: int) -> Sums:
        """Return the sums of one time group; what is added to them is added here."""
        mass, sram = (None if x is None else x[group] for x in (self.mass, self.sram))
        return Sums(self.r2g[group], self.g2r[group], mass, sram)

    def frozen(self, default: bool) -> LayerSums:
        """Return a copy on CPU, which later calls no longer change; ``default``: whether in the default layer set."""

        def copy(x: Tensor) -> Tensor:
            return x.detach().to("cpu", copy=True)

        return replace(
            self,
            default=default,
            counts=tuple(self.counts),
            r2g=copy(self.r2g),
            g2r=copy(self.g2r),
            mass=None if self.mass is None else copy(self.mass),
            sram=None if self.sram is None else copy(self.sram),
        )

    @property
    def heads(self) -> int:
        return self.r2g.shape[2]


def check_sums(sums: Sequence[LayerSums], regions: Sequence[str]) -> None:
    """Refuse sums that no level could read: shapes against grids, counts, time groups, images and regions.

    Raises:
        ValueError: names the layer and the field.
    """
    seen: set[tuple[str, str]] = set()
    T, B = sums[0].r2g.shape[:2] if sums[0].r2g.ndim == 4 else (0, 0)
    for s in sums:
        where = f"layer {s.layer!r}, reference {s.reference!r}"
        if (s.layer, s.reference) in seen:
            raise ValueError(f"{where}: listed twice")
        seen.add((s.layer, s.reference))
        H, K = (s.r2g.shape[2] if s.r2g.ndim == 4 else 0), s.g2r.shape[-1] if s.g2r.ndim else 0
        expected: dict[str, tuple[int, ...]] = {
            "r2g": (T, B, H, area(s.grid)),
            "g2r": (T, B, H, K if s.reference_grid is None else s.skip + area(s.reference_grid)),
            "mass": (T, B, H, area(s.grid)),
            "sram": (T, B, H, len(regions), K),
        }
        for name in STORED:
            x: Tensor | None = getattr(s, name)
            if x is None and name == "sram" and regions:
                raise ValueError(f"{where}: no sram, although {len(regions)} regions are registered")
            if x is not None and (tuple(x.shape) != expected[name] or min(expected[name]) < 1):
                raise ValueError(
                    f"{where}: {name} has shape {tuple(x.shape)}, but grid {s.grid}, reference_grid "
                    f"{s.reference_grid}, skip {s.skip}, {T} time groups, {B} images, {H} heads and {len(regions)} "
                    f"regions make {expected[name]}"
                )
            if x is not None and not x.is_floating_point():
                raise ValueError(f"{where}: {name} must be floating point, got {x.dtype}")
        if len(s.counts) != T:
            raise ValueError(f"{where}: counts has {len(s.counts)} entries for {T} time groups")
        if K - s.skip < 1:
            raise ValueError(f"{where}: skip is {s.skip} of {K} reference tokens, which leaves none")


# ---------------------------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """Source of a level's token values."""

    @property
    def name(self) -> str:
        """Name in error messages."""

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        """Return ``(sums [T', X, heads, N], counts [T'])`` of a layer's chosen time groups; ``X`` maps a head."""

    def heads_at_once(self, s: LayerSums) -> int:
        """Return how many heads to ask for at once, so that answers stay small."""


@dataclass(frozen=True)
class RunningSums:
    """The running sums of a direction."""

    name: Direction

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        x: Tensor = getattr(s, self.name)
        return x[times][:, :, heads], torch.tensor([s.counts[t] for t in times])

    def heads_at_once(self, s: LayerSums) -> int:
        return s.heads


@dataclass(frozen=True)
class RegisteredRegion:
    """The running sums of one registered region."""

    region: int
    name: str = "SRAM"

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        assert s.sram is not None, "check_sums refuses regions without their sums"
        return s.sram[times][:, :, heads, self.region], torch.tensor([s.counts[t] for t in times])

    def heads_at_once(self, s: LayerSums) -> int:
        return s.heads


@dataclass(frozen=True)
class RecordedRegions:
    """Rows recomputed from recorded queries and keys; ``X = B·R`` for ``R`` regions."""

    entries: Sequence[QKEntry]
    weights: RegionOnGrid
    count: int
    reverse: bool = False
    name: str = "SRAM"

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        B, N = s.r2g.shape[1], s.r2g.shape[-1] if self.reverse else s.g2r.shape[-1]
        grid = s.reference_grid if self.reverse else s.grid
        assert grid is not None, "check_reference_grid refuses a reference without one"
        weights = self.weights(grid)
        if self.reverse:  # tokens off the grid have no weight
            weights = F.pad(weights, (s.skip, 0))
        if weights.shape[0] not in (1, B):
            raise ValueError(f"a mask for each of {weights.shape[0]} images, but the maps hold {B}")
        sums, counts = torch.zeros(len(times), B, self.count, len(heads), N), torch.zeros(len(times), dtype=torch.int64)
        for t, group in enumerate(times):
            mine = [e for e in self.entries if (e.layer, e.reference, e.group) == (s.layer, s.reference, group)]
            counts[t] = len(mine)
            sums[t] = rows_of_calls(mine, s.grid, weights, heads, sums[t], reverse=self.reverse)
        return sums.flatten(1, 2), counts

    def heads_at_once(self, s: LayerSums) -> int:
        return heads_at_once(self.count, s.r2g.shape[1], max(s.r2g.shape[-1], s.g2r.shape[-1]))


@dataclass
class CachedSource:
    """A source that keeps its answer for the last layer, for all heads and times."""

    source: Source
    _last: tuple[LayerSums, Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        return self.source.name

    def values(self, s: LayerSums, heads: list[int], times: list[int]) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] is not s:
            self._last = (s, *self.source.values(s, list(range(s.heads)), list(range(len(s.counts)))))
        _, sums, counts = self._last
        return sums[times][:, :, heads], counts[times]

    def heads_at_once(self, s: LayerSums) -> int:
        return s.heads


# ----------------------------------------------------------------------------------------------------------- levels


@dataclass(frozen=True)
class Aggregation:
    """The chosen maps, layer by layer on the common grid: what a level is a mean of."""

    direction: Direction
    sums: Sequence[LayerSums]
    source: Source
    times: list[int]
    heads: Picks
    size: Grid
    lift: bool
    axis: Axis | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(maps [X, G, h, w], seen [G])`` a layer; ``G`` time groups or heads at these levels, else 1.

        A map without any call is NaN, and ``seen`` is False there.

        Raises:
            ValueError: the sums of calls that ran are not finite; names layer and time groups.
        """
        for s in self.sums:
            heads = pick(self.heads, s.heads, f"heads of {s.layer}")
            step = self.source.heads_at_once(s)
            parts = []
            for start in range(0, len(heads), step):
                sums, counts = self.source.values(s, heads[start : start + step], self.times)  # [G, X, H', N], [G]
                self._check_finite(s, sums)
                if self.axis != "time":
                    sums, counts = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
                maps = self.on_grid(s, sums / counts[:, None, None, None])  # [G, X, H', h, w]; 0 / 0 is NaN
                parts.append(maps if self.axis == "head" else maps.sum(2, keepdim=True))
            if self.axis == "head":
                yield torch.cat(parts, dim=2)[0], (counts > 0).expand(len(heads))
            else:
                yield (reduce(torch.add, parts) / len(heads))[:, :, 0].transpose(0, 1), counts > 0

    def mean_layers(self) -> Tensor:
        """Return ``[X, G, h, w]``: the mean over the layers that ran."""
        total, ran = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for maps, seen in self:
            total = total + torch.where(seen[:, None, None], maps, 0.0)
            ran = ran + seen
        return total / ran[:, None, None]

    def on_grid(self, s: LayerSums, x: Tensor) -> Tensor:
        """Lay ``[..., N]`` token values on the common grid: ``[..., h, w]``, not negative."""
        h, w = grid_of(s, self.direction)
        if self.direction == "g2r":
            scale, x = float(s.keys), x[..., s.skip :]
        else:
            scale = (s.queries or x.shape[-1]) if self.direction == "r2g" else s.keys / s.g2r.shape[-1]
        x = x * scale if self.lift else x
        grids = x.reshape(-1, 1, h, w)
        if (h, w) != self.size:
            grids = F.interpolate(grids, self.size, mode="bicubic", align_corners=False)
        return grids.clamp_min(0).reshape(*x.shape[:-1], *self.size)

    def _check_finite(self, s: LayerSums, sums: Tensor) -> None:
        """Refuse ``sums [G, X, H', N]`` that are NaN or infinite: a mean over them says nothing."""
        broken = [t for t, x in zip(self.times, sums, strict=True) if not x.isfinite().all()]
        if broken:
            raise ValueError(not_finite_message({s.layer: broken}, s.reference, self.source.name))


def not_finite(sums: Sequence[LayerSums]) -> dict[str, list[int]]:
    """Return the time groups of each layer in which a running sum is NaN or infinite: ``{layer: [group, …]}``."""
    found: dict[str, list[int]] = {}
    for s in sums:
        kept = [x for x in (s.r2g, s.g2r, s.mass, s.sram) if x is not None]
        finite = torch.stack([x.flatten(1).isfinite().all(1) for x in kept]).all(0)
        if not finite.all():
            found[s.layer] = (~finite).nonzero().flatten().tolist()
    return found


def not_finite_message(broken: dict[str, list[int]], reference: str, what: str = "attribution") -> str:
    """Say which layers' sums are not finite, why that happens, and what to do."""
    listing = ", ".join(f"{layer} (time groups {', '.join(map(str, t))})" for layer, t in list(broken.items())[:3])
    more = f" and {len(broken) - 3} more layers" if len(broken) > 3 else ""
    name = what.upper() if what in ("r2g", "g2r") else what
    return (
        f"the {name} sums of reference {reference!r} are not finite (NaN or infinite) in {listing}{more}: queries or "
        "keys of the model were not finite there, in float16 most often by overflow. Run the model in bfloat16 or "
        "float32, or leave these out with layers= or times="
    )


def grid_of(s: LayerSums, direction: Direction) -> Grid:
    """Return the grid that a direction's maps of a layer lie on."""
    if direction != "g2r":
        return s.grid
    assert s.reference_grid is not None, "check_reference_grid refuses a reference without one"
    return s.reference_grid


def area(grid: Grid) -> int:
    return grid[0] * grid[1]


def check_direction(direction: Direction, sums: Sequence[LayerSums], source: Source | None) -> None:
    """Refuse a direction of which a reference has no map; the message says why."""
    if direction == "g2r" and sums[0].kind in ("word", "text"):
        raise ValueError(
            f"no map on {sums[0].reference!r}: words have no rows and columns. Where they acted is 'r2g', how much of "
            "the attention they took is 'mass'"
        )
    if direction == "g2r":
        check_reference_grid(sums, "G2R" if source is None else source.name)
    if direction == "mass" and any(s.mass is None for s in sums):
        raise ValueError(
            f"no mass for reference {sums[0].reference!r}: its tokens are all the keys there are, so it is 1"
        )


def check_reference_grid(sums: Sequence[LayerSums], what: str) -> None:
    """Refuse a map on a reference of one token, or of tokens without rows and columns."""
    for s in sums:
        if s.g2r.shape[-1] == 1:
            raise ValueError(
                f"no {what} for reference {s.reference!r}: it is one token, and a softmax over one key is identically "
                "1. R2G, which normalises over the generated tokens, is still a map: use 'r2g'"
            )
        if s.reference_grid is None:
            raise ValueError(
                f"no {what} for reference {s.reference!r}: its {s.g2r.shape[-1]} tokens have no 2-D layout (pooled or "
                "resampled); pass Reference(grid=(h, w)) if they do, or use 'r2g'"
            )


def check_heads(sums: Sequence[LayerSums]) -> None:
    if len({s.heads for s in sums}) > 1:
        listing = ", ".join(f"{s.layer}: {s.heads}" for s in sums)
        raise ValueError(f"head maps need layers of equal head count, choose with layers=; there are {listing}")


def pick(picks: Picks, length: int, name: str) -> list[int]:
    """Return the chosen indices as a list.

    Raises:
        IndexError: one is outside, or none is chosen.
    """
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
