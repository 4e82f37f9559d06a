"""Running sums of attribution: per layer, reference, tile and time group, kept where the model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from i2am.families import TokenLayout
from i2am.maps.aggregate import LayerSums
from i2am.references import Grid, KeySet, Reference

Place = tuple[int, int] | None  # of a tile's latents on the picture's: (top, left); None: the whole picture


class SumStore:
    """The tracks of a tracer, in the order in which layers first ran."""

    def __init__(self) -> None:
        self.time_groups = 0  # until the first call
        self.tracks: dict[tuple[str, str, Place], LayerSums] = {}
        self.tokens: dict[str, str] = {}  # reference → which of the keys it is, for the provenance

    def settle(self, time_groups: int) -> None:
        """Note into how many time groups calls are summed.

        Raises:
            ValueError: earlier ones were summed into another number of groups.
        """
        if self.tracks and self.time_groups != time_groups:
            raise ValueError(
                f'time_groups="steps": this run has {time_groups} steps, an earlier one had {self.time_groups}: maps() '
                "then reset() between runs of different length"
            )
        self.time_groups = time_groups

    def open(
        self,
        layer: str,
        layout: TokenLayout,
        q: Tensor,
        k: Tensor,
        queries: int,
        regions: int = 0,
        place: Place = None,
        heads: int | None = None,
    ) -> list[LayerSums]:
        """Return the tracks that one attention call adds to, made on the first call.

        Args:
            layer: its name.
            layout: which references and other sets are among the keys.
            q: ``[B, H, Nq, d]`` conditional queries.
            k: ``[B, H, Nk, d]`` conditional keys.
            queries: number of generated ones among the queries.
            regions: how many are registered.
            place: where the tile lies.
            heads: of the whole call, where q has some of them.

        Raises:
            ValueError: the call does not look like the earlier ones of this layer (batch, heads, grids).
        """
        every: list[Reference] = [*layout.references, *layout.sets]
        share = any(reference.count(k.shape[2]) < k.shape[2] for reference in every)
        rolls = [*(layout.rollout or [None] * len(layout.references)), *[None] * len(layout.sets)]
        return [
            self._track(layer, layout.grid, r, q, k, heads or q.shape[1], queries, share, regions, roll, place)
            for r, roll in zip(every, rolls, strict=True)
        ]

    def _track(
        self,
        layer: str,
        grid: Grid,
        reference: Reference,
        q: Tensor,
        k: Tensor,
        H: int,
        queries: int,
        share: bool,
        regions: int,
        roll: Tensor | None,
        place: Place,
    ) -> LayerSums:
        T, B, K, keys = self.time_groups, q.shape[0], reference.count(k.shape[2]), k.shape[2]
        if roll is not None:
            keys, K = round(keys * roll.shape[-1] / K), roll.shape[-1]
        key = (layer, reference.name, place)
        track = self.tracks.get(key)
        if track is None:

            def zeros(*shape: int) -> Tensor:
                with torch.inference_mode(False):  # sums outlive the mode of the call that made them
                    return torch.zeros(T, B, H, *shape, dtype=torch.float32, device=q.device)

            assert not isinstance(reference.grid, str), "a reference in a layout lies on a grid of its own"
            self.tokens.setdefault(reference.name, _tokens(reference, k.shape[2]))
            track = self.tracks[key] = LayerSums(
                layer=layer,
                reference=reference.name,
                grid=grid,
                reference_grid=reference.grid,
                skip=reference.skip,
                keys=keys,
                default=True,
                r2g=zeros(queries),
                g2r=zeros(K),
                mass=zeros(queries) if share else None,
                sram=zeros(regions, K) if regions else None,
                counts=[0] * T,
                kind=reference.kind if isinstance(reference, KeySet) else "reference",
            )
        seen = (track.grid, tuple(track.r2g.shape[1:]), track.reference_grid, tuple(track.g2r.shape[1:]))
        now = (grid, (B, H, queries), reference.grid, (B, H, K))
        if seen != now:
            raise ValueError(
                f"layer {layer}: grid, [B, H, queries], reference grid, [B, H, keys] of reference {reference.name!r} "
                f"were {seen} and are now {now}; one set of maps needs the same batch and sizes: maps() then reset() "
                "between such runs"
            )
        if track.r2g.device != q.device:
            raise ValueError(f"layer {layer} moved from {track.r2g.device} to {q.device}; reset() the tracer first")
        return track


def _tokens(reference: Reference, keys: int) -> str:
    """Say which of ``keys`` keys are a reference's: "512…4607 of 4608"."""
    if isinstance(reference.tokens, slice):
        chosen = range(keys)[reference.tokens]
        if chosen.step == 1:
            return f"all {keys}" if len(chosen) == keys else f"{chosen.start}…{chosen.stop - 1} of {keys}"
    return f"{reference.count(keys)} of {keys}"
