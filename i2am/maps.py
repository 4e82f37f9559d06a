"""Attribution maps: what the running sums say, at the levels of I2AM (Park & Jang, ICLR 2025, section 3).

One path for all levels: mean over time → bicubic to the common grid → clamp at 0 → mean over heads → mean over layers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from i2am.layout import Grid, LayerFilter, choose_layers

if TYPE_CHECKING:
    from i2am.recorder import Track

DIRECTIONS = ("r2g", "g2r", "mass")
NORMALIZE = ("raw", "lift")
FORMAT = "i2am-maps-1"

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
    mass: Tensor | None  # [T, B, H, Q]

    @property
    def heads(self) -> int:
        return self.r2g.shape[2]


class AttributionMaps:
    """Bidirectional attribution maps at every level, detached from the model that they were recorded on.

    Directions: ``"r2g"``: which regions of the generated image the reference influenced, on the generated grid;
    ``"g2r"``: which parts of the reference contributed, on the reference grid; ``"mass"``: the share of each generated
    token's attention that goes to the reference, where it shares the attention with other keys.

    Every level takes, beside the direction:

    * ``reference``: its name, needed where there are several (``maps.references``);
    * ``layers``: a name, a glob pattern, several, or a predicate. None: every recorded layer but the mid block;
    * ``heads``, ``times``: indices of heads and of time groups to look at. None: all;
    * ``size``: ``(height, width)`` of the common grid. None: the largest grid among the chosen layers;
    * ``normalize``: ``"raw"`` (the paper's), or ``"lift"``: times the number of tokens, so that 1.0 is uniform at every
      resolution.

    All return float32 on CPU, and raise ValueError when there is no such map; the message says why.
    """

    def __init__(self, sums: Sequence[LayerSums]):
        if not sums:
            raise ValueError("no maps without a recorded layer")
        self._sums = tuple(sums)

    @classmethod
    def of(cls, tracks: Iterable[Track], default: set[str]) -> AttributionMaps:
        """A copy of a recorder's running sums; ``default`` names the layers of the default set."""
        return cls([
            LayerSums(
                layer=t.layer,
                reference=t.reference.name,
                grid=t.grid,
                reference_grid=t.reference.grid,
                skip=t.reference.skip,
                keys=t.keys,
                default=t.layer in default,
                counts=tuple(t.counts),
                r2g=_copy(t.r2g),
                g2r=_copy(t.g2r),
                mass=None if t.mass is None else _copy(t.mass),
            )
            for t in tracks
        ])

    # ---------------------------------------------------------------------------------------------------- contents

    @property
    def layers(self) -> list[str]:
        """The default layer set, in execution order: what every level reads unless ``layers=`` says otherwise."""
        return _unique(s.layer for s in self._sums if s.default) or self.recorded_layers

    @property
    def recorded_layers(self) -> list[str]:
        """Every recorded layer in execution order, the mid block too; any of them can be named in ``layers=``."""
        return _unique(s.layer for s in self._sums)

    @property
    def references(self) -> list[str]:
        """Names of the references; with several, each level needs ``reference=``."""
        return _unique(s.reference for s in self._sums)

    @property
    def time_groups(self) -> int:
        return self._sums[0].r2g.shape[0]

    @property
    def batch(self) -> int:
        """Number of images."""
        return self._sums[0].r2g.shape[1]

    def counts(self, reference: str | None = None) -> dict[str, list[int]]:
        """Attention calls seen per layer, one number a time group."""
        name = self._reference(reference)
        return {s.layer: list(s.counts) for s in self._sums if s.reference == name}

    def grids(self, reference: str | None = None) -> dict[str, Grid]:
        """Each layer's own generated grid ``(height, width)``."""
        name = self._reference(reference)
        return {s.layer: s.grid for s in self._sums if s.reference == name}

    def __repr__(self) -> str:
        references = ", ".join(repr(name) for name in self.references)
        return (
            f"AttributionMaps({len(self.recorded_layers)} layers, references {references}, batch {self.batch}, "
            f"{self.time_groups} time groups)"
        )

    # ------------------------------------------------------------------------------------------------------ levels

    def ulam(self, direction: str, **options) -> Tensor:
        """Unified map ``[B, h, w]``: over all chosen times, heads and layers. Options: see the class."""
        return self._levels(direction, **options).mean_layers()[:, 0]

    def tlam(self, direction: str, **options) -> Tensor:
        """Time-level maps ``[B, T, h, w]``, one a chosen time group; NaN for a group in which nothing ran."""
        return self._levels(direction, keep_times=True, **options).mean_layers()

    def hlam(self, direction: str, **options) -> Tensor:
        """Head-level maps ``[B, H, h, w]``. Raises ValueError, naming the layers, where head counts differ."""
        levels = self._levels(direction, keep_heads=True, **options)
        heads = {s.layer: s.heads for s in levels.sums}
        if len(set(heads.values())) > 1:
            listing = ", ".join(f"{layer}: {n}" for layer, n in heads.items())
            raise ValueError(f"head maps need layers of equal head count, choose with layers=; there are {listing}")
        return levels.mean_layers()

    def llam(self, direction: str, **options) -> Tensor:
        """Layer-level maps ``[B, L, h, w]`` in the order of ``maps.layers`` (or of the chosen ones)."""
        return torch.cat([m for _, m, _ in self._levels(direction, **options)], dim=1)

    def _levels(
        self,
        direction: str,
        *,
        reference: str | None = None,
        layers: LayerFilter = None,
        heads: Picks = None,
        times: Picks = None,
        size: Grid | None = None,
        normalize: str = "raw",
        keep_times: bool = False,
        keep_heads: bool = False,
    ) -> _Levels:
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
        sums = self._chosen(self._reference(reference), layers)
        _check_direction(direction, sums)
        if size is None:
            size = max((_grid(s, direction) for s in sums), key=lambda g: g[0] * g[1])
        elif len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"size must be (height, width), both positive, got {size!r}")
        picked = _pick(times, self.time_groups, "times")
        return _Levels(direction, sums, picked, heads, tuple(size), normalize == "lift", keep_times, keep_heads)

    def _reference(self, reference: str | None) -> str:
        names = self.references
        if reference is None and len(names) == 1:
            return names[0]
        if reference not in names:
            what = "several references: pass reference=" if reference is None else f"no reference {reference!r}:"
            raise ValueError(f"{what} one of {', '.join(repr(n) for n in names)}")
        return reference

    def _chosen(self, reference: str, layers: LayerFilter) -> list[LayerSums]:
        of_reference = {s.layer: s for s in self._sums if s.reference == reference}
        if layers is None:
            chosen = [name for name in of_reference if of_reference[name].default] or list(of_reference)
        else:
            chosen = choose_layers(of_reference, layers)
        return [of_reference[name] for name in chosen]

    # ------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the maps as safetensors, at once or not at all; returns the path."""
        from safetensors.torch import save_file

        path = Path(path)
        tensors, layers = {}, []
        for i, s in enumerate(self._sums):
            tensors |= {f"{i}.{d}": getattr(s, d).contiguous() for d in DIRECTIONS if getattr(s, d) is not None}
            fields = ("layer", "reference", "grid", "reference_grid", "skip", "keys", "default", "counts")
            layers.append({field: getattr(s, field) for field in fields})
        unfinished = path.with_name(path.name + ".part")
        try:
            save_file(tensors, unfinished, metadata={"format": FORMAT, "layers": json.dumps(layers)})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttributionMaps:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or not an i2am file.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no maps file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a maps file of i2am (format {metadata.get('format')!r})")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        return cls([
            LayerSums(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()},
                **{d: tensors.get(f"{i}.{d}") for d in DIRECTIONS},
            )
            for i, fields in enumerate(json.loads(metadata["layers"]))
        ])


@dataclass(frozen=True)
class _Levels:
    """The chosen maps, layer by layer on the common grid: what a level is a mean of."""

    direction: str
    sums: list[LayerSums]
    times: list[int]
    heads: Picks
    size: Grid
    lift: bool
    keep_times: bool
    keep_heads: bool

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """``(layer, maps [B, G, h, w], seen [G])`` with ``G`` the kept axis (time groups or heads), else 1.

        A map without any call is NaN, and ``seen`` is False there.
        """
        for s in self.sums:
            counts = torch.tensor([s.counts[t] for t in self.times])
            sums = getattr(s, self.direction)[self.times]  # [G, B, H, N]
            sums = sums[:, :, _pick(self.heads, s.heads, f"heads of {s.layer}")]
            if not self.keep_times:
                counts, sums = counts.sum(0, keepdim=True), sums.sum(0, keepdim=True)
            mean = sums / counts[:, None, None, None]  # [G, B, H, N]; 0 / 0 is NaN
            maps = self._on_grid(s, mean)  # [G, B, H, h, w]
            seen = counts > 0
            if self.keep_heads:
                yield s.layer, maps[0], seen.expand(maps.shape[2])
            else:
                yield s.layer, maps.mean(2).transpose(0, 1), seen

    def mean_layers(self) -> Tensor:
        """``[B, G, h, w]``: the mean over the layers that ran."""
        total, ran = 0.0, 0
        for _, maps, seen in self:
            total = total + torch.where(seen[:, None, None], maps, 0.0)
            ran = ran + seen
        return total / ran[:, None, None]

    def _on_grid(self, s: LayerSums, x: Tensor) -> Tensor:
        """``[..., N]`` token values → ``[..., h, w]`` on the common grid, not negative."""
        h, w = _grid(s, self.direction)
        if self.direction == "g2r":
            scale, x = s.keys, x[..., s.skip :]
        else:
            scale = x.shape[-1] if self.direction == "r2g" else s.keys / s.g2r.shape[-1]
        x = x * scale if self.lift else x
        grids = x.reshape(-1, 1, h, w)
        if (h, w) != self.size:
            grids = F.interpolate(grids, self.size, mode="bicubic", align_corners=False)
        return grids.clamp_min(0).reshape(*x.shape[:-1], *self.size)


def _grid(s: LayerSums, direction: str) -> Grid:
    return s.reference_grid if direction == "g2r" else s.grid


def _check_direction(direction: str, sums: list[LayerSums]) -> None:
    s = sums[0]
    if direction == "g2r" and s.g2r.shape[-1] == 1:
        raise ValueError(
            f"no G2R for reference {s.reference!r}: it is one token, and a softmax over one key is identically 1. R2G, "
            "which normalises over the generated tokens, is still a map: use 'r2g'"
        )
    if direction == "g2r" and s.reference_grid is None:
        raise ValueError(
            f"no G2R map for reference {s.reference!r}: its {s.g2r.shape[-1]} tokens have no 2-D layout (pooled or "
            "resampled); pass Reference(grid=(h, w)) if they do, or use 'r2g'"
        )
    if direction == "mass" and any(s.mass is None for s in sums):
        raise ValueError(f"no mass for reference {s.reference!r}: its tokens are all the keys there are, so it is 1")


def _pick(picks: Picks, length: int, name: str) -> list[int]:
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


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
