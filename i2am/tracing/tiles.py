"""Tiles: calls on a part of the picture, placed where they belong; maps on the whole canvas.

A tile's own maps are laid on the grid of the whole picture. Where tiles overlap, their mean stands, as tiled samplers
average their predictions; so it is with the rows of a region (SRAM). In G2R every call of the model weighs the same.

Where each tile has a reference of its own (its keys differ from tile to tile) on the tile's very grid, as
super-resolution has the small image's window, that one is laid on the picture, too. On any other grid there is no one
reference to draw on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from i2am.families import TokenLayout
from i2am.maps.aggregate import LayerSums
from i2am.maps.placed import Tile
from i2am.ops.tokens import TokenSet
from i2am.references import Grid
from i2am.tracing.sums import Place


def on_canvas(
    tracks: dict[tuple[str, str, Place], LayerSums],
    tiles: dict[Place, Grid],
    canvas: Grid,
    windows: Collection[tuple[str, str]] = (),
) -> list[LayerSums]:
    """Return one track per layer and reference, on the grid of the whole picture.

    Args:
        tracks: by (layer, reference, place of the tile).
        tiles: place ``(top, left)`` → size of the tile's latents.
        canvas: size of the picture's latents.
        windows: (layer, reference) of which each tile has a reference of its own.
    """
    together: dict[tuple[str, str], list[tuple[Place, LayerSums]]] = {}
    for (layer, reference, place), track in tracks.items():
        together.setdefault((layer, reference), []).append((place, track))
    return [_assemble(parts, tiles, canvas, key in windows) for key, parts in together.items()]


def _assemble(parts: list[tuple[Place, LayerSums]], tiles: dict[Place, Grid], canvas: Grid, windows: bool) -> LayerSums:
    first = parts[0][1]
    if len(parts) == 1 and parts[0][0] is None:
        return first
    cell = cell_of(tiles[parts[0][0]], first.grid)
    grid = grid_of(canvas, cell)
    counts = [sum(track.counts[g] for _, track in parts) for g in range(len(first.counts))]
    placed = {place: placed_at(place, cell, track.grid) for place, track in parts}

    def spread(name: str) -> Tensor | None:
        """Return ``[T, B, H, grid]`` sums whose mean over ``counts`` is the mean of the tiles that cover a token."""
        values = getattr(first, name)
        if values is None:
            return None
        total = values.new_zeros(*values.shape[:3], grid[0] * grid[1])
        cover = values.new_zeros(values.shape[0], 1, 1, grid[0] * grid[1])
        for place, track in parts:
            for group, count in enumerate(track.counts):
                if count:
                    total[group] += placed[place].onto(getattr(track, name)[group], grid)
                    cover[group] += count * placed[place].cover(grid).to(cover)
        mean = torch.where(cover > 0, total / cover.clamp_min(torch.finfo(cover.dtype).tiny), 0.0)
        return mean * mean.new_tensor(counts)[:, None, None, None]

    def added(name: str) -> Tensor | None:
        values = [getattr(track, name) for _, track in parts]
        return None if values[0] is None else torch.stack(values).sum(0)

    same_place = windows and is_window(first.reference_grid, first.grid, first.skip)
    r2g = spread("r2g")
    g2r = spread("g2r") if same_place else added("g2r")
    assert r2g is not None
    assert g2r is not None
    mass, queries, sram = spread("mass"), first.r2g.shape[-1], None
    if first.sram is not None:  # each tile has added its part of every evaluation's mean
        _refuse_uneven(parts)
        own = [
            track.sram if track.sram is None or not same_place else placed[place].onto(track.sram, grid)
            for place, track in parts
        ]
        sram = torch.stack([x for x in own if x is not None]).sum(0) * len(parts)
    reference_grid = first.reference_grid if not windows else grid if same_place else None
    whole = replace(first, grid=grid, r2g=r2g, mass=mass, g2r=g2r, sram=sram, counts=counts, queries=queries)
    return replace(whole, reference_grid=reference_grid)


class OwnReferences:
    """Layers and references of which each tile has its own, found by the keys of two tiles in one step.

    Args:
        note: keeps a sentence for the provenance.

    Attributes:
        found: (layer, reference) whose keys differ from tile to tile.
    """

    def __init__(self, note: Callable[[str], None]):
        self.found: set[tuple[str, str]] = set()
        self._note = note
        self._compared: set[tuple[str, str]] = set()
        self._last: dict[tuple[str, str], tuple[Place, object, Tensor]] = {}

    def see(self, place: Place, when: object, layer: str, layout: TokenLayout, k: Tensor) -> None:
        """Compare a tile's reference keys with those of the tile before, once a layer.

        Args:
            place: of the tile.
            when: calls at the same time are of one step.
            layer, layout: of the call.
            k: ``[B, H, Nk, d]`` conditional keys.
        """
        for reference in layout.references:
            key = layer, reference.name
            if key in self._compared:
                continue
            keys = k[:, :, TokenSet.of(reference.tokens, k.shape[2], "keys").index]
            before, then, first = self._last.get(key, (None, None, keys))
            if before is None or then != when:
                self._last[key] = place, when, keys
            if before is None or then != when or before == place:  # of several calls on a tile the first is kept
                continue
            del self._last[key]
            self._compared.add(key)
            if keys.shape == first.shape and torch.allclose(
                keys, first, rtol=1e-3, atol=1e-5 * float(first.abs().max())
            ):
                continue
            self.found.add(key)
            if is_window(reference.grid, layout.grid, reference.skip):
                self._note(
                    "each tile has a reference of its own, on its own part of the picture: both lie on the whole"
                )
            else:
                self._note(
                    f"each tile has a reference {reference.name!r} of its own, not on the tile's grid: there is no one "
                    "reference to draw G2R and SRAM on"
                )


def is_window(reference: Grid | str | None, grid: Grid, skip: int) -> bool:
    """Tell whether the tokens of a tile's own reference lie as its generated ones do: on the same part of a picture."""
    return reference == grid and skip == 0


def _refuse_uneven(parts: list[tuple[Place, LayerSums]]) -> None:
    """Raise ValueError where tiles ran differently often in a time group: a region's parts would not fit together."""
    for group in range(len(parts[0][1].counts)):
        counts = {place: track.counts[group] for place, track in parts}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"layer {parts[0][1].layer}: tiles ran differently often in time group {group}, {counts}, so the "
                "registered regions (sram=) of the whole picture are not their mean: reset() after a run that was "
                'interrupted, or trace with record="qk" instead'
            )


def cell_of(tile: Grid, tokens: Grid) -> tuple[float, float]:
    """Return how many latents a token of a layer is high and wide."""
    return tile[0] / tokens[0], tile[1] / tokens[1]


def grid_of(canvas: Grid, cell: tuple[float, float]) -> Grid:
    """Return the grid of the whole picture in a layer's tokens."""
    return math.ceil(canvas[0] / cell[0]), math.ceil(canvas[1] / cell[1])


def placed_at(place: Place, cell: tuple[float, float], tokens: Grid) -> Tile:
    """Return where a tile's tokens lie on a layer's grid of the whole picture."""
    top, left = place or (0, 0)
    return Tile(top / cell[0], left / cell[1], tokens)


def needs_place(size: Grid, whole: Grid) -> str:
    """Say that a call was on a part of the picture, and that nothing tells which."""
    return (
        f"the model's latents are {size[0]}×{size[1]}, those that the scheduler steps are {whole[0]}×{whole[1]}: a "
        "tile needs its place on the picture: with tracer.tile(top, left): model(…)"
    )


def check_place(place: Grid, size: Grid, canvas: Grid) -> None:
    """Refuse a tile that does not lie on the picture."""
    if any(p < 0 or p + s > c for p, s, c in zip(place, size, canvas, strict=True)):
        raise ValueError(
            f"a tile of {size[0]}×{size[1]} latents at {place} does not lie on the picture's {canvas[0]}×{canvas[1]}"
        )


def extent(tiles: Iterable[tuple[Place, Grid]]) -> Grid:
    """Return the size of the smallest picture that holds all tiles."""
    ends = [((p or (0, 0))[0] + s[0], (p or (0, 0))[1] + s[1]) for p, s in tiles]
    return max(e[0] for e in ends), max(e[1] for e in ends)
