"""Budgets: on what the generated tokens spend their attention, by step and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from i2am.maps.aggregate import LayerSums, area
from i2am.maps.sram import Region, region_weights
from i2am.references import Grid, LayerFilter

if TYPE_CHECKING:
    from i2am.maps.reading import RecordedLayers

REST = "rest"  # keys that were not told apart
OTHER_WORDS = "other words"  # of the text


class Budget(NamedTuple):
    """Shares of attention that a place of the generated picture pays to each source; they sum to 1.

    Attributes:
        sources: names: references, words, the (other) text, the picture itself, the rest.
        layers: names, in execution order.
        shares: ``[B, T, L, S]`` means over heads and the place's tokens; NaN where nothing ran.
        one_group_a_step: whether each time group is one denoising step.
    """

    sources: list[str]
    layers: list[str]
    shares: Tensor
    one_group_a_step: bool = False

    def over_time(self) -> Tensor:
        """Return ``[B, T, S]``: the mean over the layers that ran."""
        return self.shares.nanmean(2)

    def total(self) -> dict[str, Tensor]:
        """Return each source's share ``[B]``: the mean over time groups and layers that ran."""
        return dict(zip(self.sources, self.over_time().nanmean(1).unbind(-1), strict=True))


def read_budget(
    maps: RecordedLayers,
    region: Region | None,
    canvas: Grid,
    sources: Sequence[str] | None,
    layers: LayerFilter,
    one_group_a_step: bool,
) -> Budget:
    """Return the budget of a place; see :meth:`AttributionMaps.budget`."""
    wanted = maps.sources if sources is None else list(sources)
    unknown = [name for name in wanted if name not in maps.sources]
    if unknown or not wanted:
        raise ValueError(f"sources must be among {', '.join(map(repr, maps.sources))}, got {sources!r}")
    found = {name: {s.layer: s for s in maps._chosen(name, layers)} for name in wanted}
    names = list(dict.fromkeys(layer for of in found.values() for layer in of))
    by_layer = [_of_layer({n: of[layer] for n, of in found.items() if layer in of}, wanted) for layer in names]
    kinds = {name: next(iter(of.values())).kind for name, of in found.items()}
    weights = None if region is None else region_weights(region, canvas)
    shares = torch.stack(
        [
            torch.stack([_share(of[n], None if weights is None else weights(of[n].grid)) for n in wanted], dim=-1)
            for of in by_layer
        ],
        dim=2,
    )  # [B, T, L, S]
    return Budget(*_parted(shares, wanted, kinds), one_group_a_step)._replace(layers=names)


def _of_layer(of: dict[str, LayerSums], wanted: Sequence[str]) -> dict[str, LayerSums]:
    """Return a layer's sums of each source, if they share one softmax.

    Raises:
        ValueError: they do not, so that there are no shares of one attention.
    """
    apart = [name for name in wanted if name not in of or of[name].mass is None]
    first = next(iter(of.values()))
    if apart and len(wanted) == 1:
        raise ValueError(f"layer {first.layer}: {apart[0]!r} is all the keys there are, so its share is 1")
    if apart or len({s.keys for s in of.values()}) > 1:
        raise ValueError(
            f"layer {first.layer}: {' and '.join(map(repr, wanted))} are not among the keys of one attention call "
            "(an adapter has a softmax of its own), so they have no shares of one: choose with sources= and layers="
        )
    return of


def _share(s: LayerSums, weights: Tensor | None) -> Tensor:
    """Return a source's share of a layer, ``[B, T]``."""
    assert s.mass is not None, "_of_layer refuses sums without mass"
    counts = torch.tensor(list(s.counts), dtype=torch.float32)[:, None, None]
    mass = s.mass.mean(2) / counts  # [T, B, Q], 0 / 0 is NaN
    w = torch.full((1, 1), 1 / area(s.grid)) if weights is None else weights[:, 0]
    return (mass * w).sum(-1).T


def _parted(shares: Tensor, names: list[str], kinds: Mapping[str, str]) -> tuple[list[str], list[str], Tensor]:
    """Return ``(sources, [], shares)`` that sum to 1: the text without its words, and what is left over."""
    parts = dict(zip(names, shares.unbind(-1), strict=True))
    words = [parts[name] for name in names if kinds[name] == "word"]
    text = next((name for name in names if kinds[name] == "text"), None)
    if text is not None and words:
        parts = {OTHER_WORDS if n == text else n: x - sum(words) if n == text else x for n, x in parts.items()}
    order = {"reference": 0, "word": 1, "text": 2, "self": 3}
    ordered = sorted(parts, key=lambda name: order[kinds.get(name, "text")])
    rest = 1 - torch.stack([parts[name] for name in ordered]).sum(0)
    if not bool((rest.abs() < 1e-4)[~rest.isnan()].all()):
        parts[REST] = rest
        ordered.append(REST)
    return ordered, [], torch.stack([parts[name].clamp(0, 1) for name in ordered], dim=-1)
