"""What was recorded, by name, and the one way to read it: which layers, times and heads, on which grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from i2am.maps.aggregate import (
    Aggregation,
    LayerSums,
    Picks,
    RunningSums,
    Source,
    area,
    check_direction,
    check_heads,
    check_sums,
    grid_of,
    not_finite,
    pick,
)
from i2am.maps.names import AXES, DIRECTIONS, NORMALIZE, Axis, Direction, Normalize
from i2am.references import Grid, LayerFilter, choose_layers


class Options(TypedDict, total=False):
    """Options that every level takes; see :class:`AttributionMaps`."""

    reference: str | None
    layers: LayerFilter
    heads: Picks
    times: Picks
    size: Grid | None
    normalize: Normalize


class RecordedLayers:
    """The sums of every layer and reference, and what any level reads of them."""

    def __init__(self, sums: Sequence[LayerSums], regions: Sequence[str] = ()):
        if not sums:
            raise ValueError("no maps without a recorded layer")
        check_sums(sums, regions)
        self._sums = tuple(sums)
        self.regions = list(regions)

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
        """Names of the references, or of what else was told apart where there is none; with several, each level needs
        ``reference=``.
        """
        return _unique(s.reference for s in self._sums if s.kind == "reference") or self.sources

    @property
    def sources(self) -> list[str]:
        """Names of all that ``reference=`` takes: the references, words, "text" and "self"."""
        return _unique(s.reference for s in self._sums)

    @property
    def words(self) -> list[str]:
        """Names of the words that were told apart."""
        return _unique(s.reference for s in self._sums if s.kind == "word")

    @property
    def time_groups(self) -> int:
        """Number of time groups."""
        return self._sums[0].r2g.shape[0]

    @property
    def batch(self) -> int:
        """Number of images."""
        return self._sums[0].r2g.shape[1]

    def counts(self, reference: str | None = None) -> dict[str, list[int]]:
        """Return the attention calls seen per layer, one number a time group."""
        name = self._reference(reference)
        return {s.layer: list(s.counts) for s in self._sums if s.reference == name}

    def grids(self, reference: str | None = None) -> dict[str, Grid]:
        """Return each layer's own generated grid ``(height, width)``."""
        name = self._reference(reference)
        return {s.layer: s.grid for s in self._sums if s.reference == name}

    def heads(self, reference: str | None = None) -> dict[str, int]:
        """Return each layer's number of heads."""
        name = self._reference(reference)
        return {s.layer: s.heads for s in self._sums if s.reference == name}

    def not_finite(self, reference: str | None = None) -> dict[str, list[int]]:
        """Return the layers whose sums are NaN or infinite, with their time groups; no level can be read of these."""
        name = self._reference(reference)
        return not_finite([s for s in self._sums if s.reference == name])

    def chosen_layers(self, layers: LayerFilter = None, reference: str | None = None) -> list[str]:
        """Return the names of the layers that a level reads with this ``layers=``, in execution order."""
        return [s.layer for s in self._chosen(self._reference(reference), layers)]

    def _read(
        self,
        direction: Direction,
        level: Axis | None,
        *,
        reference: str | None = None,
        layers: LayerFilter = None,
        heads: Picks = None,
        times: Picks = None,
        size: Grid | None = None,
        normalize: Normalize = "raw",
        source: Source | None = None,
    ) -> Tensor:
        """Return one level: ``[B, h, w]``, or ``[B, T | H | L, h, w]``."""
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
        if level is not None and level not in AXES:
            raise ValueError(f"level must be None or one of {', '.join(AXES)}, got {level!r}")
        sums = self._chosen(self._reference(reference), layers)
        check_direction(direction, sums, source)
        if source is not None and source.name == "SRAM" and sums[0].kind != "reference":
            raise ValueError(f"patches are kept of references only, and {sums[0].reference!r} is none")
        if level == "head":
            check_heads(sums)
        if size is None:
            size = max((grid_of(s, direction) for s in sums), key=area)
        elif len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"size must be (height, width), both positive, got {size!r}")
        levels = Aggregation(
            direction=direction,
            sums=sums,
            source=source or RunningSums(direction),
            times=pick(times, self.time_groups, "times"),
            heads=heads,
            size=(size[0], size[1]),
            lift=normalize == "lift",
            axis=level,
        )
        if level == "layer":
            return torch.cat([maps for maps, _ in levels], dim=1)
        maps = levels.mean_layers()
        return maps[:, 0] if level is None else maps

    def _reference(self, reference: str | None) -> str:
        names = self.references
        if reference is None and len(names) == 1:
            return names[0]
        if reference is None or reference not in self.sources:
            what = "several references: pass reference=" if reference is None else f"no reference {reference!r}:"
            raise ValueError(f"{what} one of {', '.join(repr(n) for n in (self.sources if reference else names))}")
        return reference

    def _chosen(self, reference: str, layers: LayerFilter) -> list[LayerSums]:
        of_reference = {s.layer: s for s in self._sums if s.reference == reference}
        if layers is None:
            chosen = [name for name in of_reference if of_reference[name].default] or list(of_reference)
        else:
            chosen = choose_layers(of_reference, layers)
        return [of_reference[name] for name in chosen]


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
