"""Tiles: calls on a part of the picture, placed where they belong; maps on the whole canvas.

A tile's own maps are laid on the grid of the whole picture. Where tiles overlap, their mean stands, as tiled samplers
average their predictions. On the reference (G2R, SRAM) every call of the model weighs the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from i2am.maps.aggregate import LayerSums
from i2am.references import Grid
from i2am.tracing.sums import Place


def on_canvas(
    tracks: dict[tuple[str, str, Place], LayerSums], tiles: dict[Place, Grid], canvas: Grid
) -> list[LayerSums]:
    """Return one track per layer and reference, on the grid of the whole picture.

    Args:
        tracks: by (layer, reference, place of the tile).
        tiles: place ``(top, left)`` → size of the tile's latents.
        canvas: size of the picture's latents.
    """
    together: dict[tuple[str, str], list[tuple[Place, LayerSums]]] = {}
    for (layer, reference, place), track in tracks.items():
        together.setdefault((layer, reference), []).append((place, track))
    return [_assemble(parts, tiles, canvas) for parts in together.values()]


def _assemble(parts: list[tuple[Place, LayerSums]], tiles: dict[Place, Grid], canvas: Grid) -> LayerSums:
    first = parts[0][1]
    if len(parts) == 1 and parts[0][0] is None:
        return first
    cell = tuple(size / n for size, n in zip(tiles[parts[0][0]], first.grid, strict=True))  # latents per token
    grid = (math.ceil(canvas[0] / cell[0]), math.ceil(canvas[1] / cell[1]))
    counts = [sum(track.counts[g] for _, track in parts) for g in range(len(first.counts))]
    placed = {place: _weights(place or (0, 0), tiles[place], track.grid, cell, grid) for place, track in parts}

    def spread(name: str) -> Tensor | None:
        """Return ``[T, B, H, grid]`` sums whose mean over ``counts`` is the mean of the tiles that cover a token."""
        values = getattr(first, name)
        if values is None:
            return None
        total = values.new_zeros(*values.shape[:3], *grid)
        cover = values.new_zeros(values.shape[0], 1, 1, *grid)
        for place, track in parts:
            rows, columns = (w.to(values.device) for w in placed[place])
            for group, count in enumerate(track.counts):
                if count:
                    own = getattr(track, name)[group].unflatten(-1, track.grid)  # [B, H, h, w]
                    total[group] += rows @ own @ columns.mT
                    cover[group] += count * (rows.sum(1)[:, None] * columns.sum(1))
        mean = torch.where(cover > 0, total / cover.clamp_min(torch.finfo(cover.dtype).tiny), 0.0)
        return (mean * mean.new_tensor(counts)[:, None, None, None, None]).flatten(-2)

    def added(name: str) -> Tensor | None:
        values = [getattr(track, name) for _, track in parts]
        return None if values[0] is None else torch.stack(values).sum(0)

    r2g = spread("r2g")
    g2r = added("g2r")
    assert r2g is not None
    assert g2r is not None
    mass, sram, queries = spread("mass"), added("sram"), first.r2g.shape[-1]
    return replace(first, grid=grid, r2g=r2g, mass=mass, g2r=g2r, sram=sram, counts=counts, queries=queries)


def _weights(place: Grid, size: Grid, tokens: Grid, cell: tuple[float, ...], grid: Grid) -> tuple[Tensor, Tensor]:
    """Return, of rows and of columns, ``[grid, tokens]``: the share of each cell of the picture that a token covers."""
    out = []
    for axis in (0, 1):
        ours = torch.arange(grid[axis], dtype=torch.float64)[:, None] * cell[axis]  # [grid, 1] top or left edges
        its = place[axis] + torch.arange(tokens[axis], dtype=torch.float64) * cell[axis]  # [tokens]
        overlap = torch.minimum(ours + cell[axis], its + cell[axis]) - torch.maximum(ours, its)
        out.append((overlap.clamp_min(0) / cell[axis]).float())
    return out[0], out[1]


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
