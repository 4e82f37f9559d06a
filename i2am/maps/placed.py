"""Tiles of a picture: where a call's tokens lie on the whole grid, and means over the tiles that cover a cell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.references import Grid


class Tile(NamedTuple):
    """Place of one call's tokens on the grid of the whole picture, in its cells; it may begin between two of them."""

    top: float
    left: float
    grid: Grid

    def cover(self, canvas: Grid) -> Tensor:
        """Return ``[h·w]`` how much of each cell of the picture the tile covers, 0…1."""
        rows, columns = _shares(self, canvas)
        return (rows.sum(1)[:, None] * columns.sum(1)).flatten()

    def onto(self, x: Tensor, canvas: Grid) -> Tensor:
        """Lay token values ``[..., tokens]`` on the picture, ``[..., h·w]``: each cell takes its share of a token."""
        rows, columns = (w.to(x) for w in _shares(self, canvas))
        laid: Tensor = rows @ x.unflatten(-1, self.grid) @ columns.mT
        return laid.flatten(-2)

    def of(self, weights: Tensor, canvas: Grid) -> Tensor:
        """Return what weights of cells ``[..., h·w]`` come to on the tile's tokens, ``[..., tokens]``."""
        rows, columns = (w.to(weights) for w in _shares(self, canvas))
        own: Tensor = rows.mT @ weights.unflatten(-1, canvas) @ columns
        return own.flatten(-2)


@lru_cache(maxsize=1024)
def _shares(tile: Tile, canvas: Grid) -> tuple[Tensor, Tensor]:
    """Return, of rows and of columns, ``[cells, tokens]``: the share of each cell that a token covers."""
    out = []
    for start, tokens, cells in zip(tile[:2], tile.grid, canvas, strict=True):
        ours = torch.arange(cells, dtype=torch.float64)[:, None]
        its = start + torch.arange(tokens, dtype=torch.float64)
        out.append((torch.minimum(ours, its) + 1 - torch.maximum(ours, its)).clamp_min(0).float())
    return out[0], out[1]


def per_tile(weights: Tensor, tiles: Sequence[Tile], canvas: Grid) -> list[Tensor]:
    """Return a region's weights on the tokens of each tile, so that the tiles' rows add up to the region's mean row.

    The row of a cell is the mean over the tiles that cover it; cells that none covers have no weight.

    Args:
        weights: ``[1 | B, R, h·w]`` over the cells of the picture.
        tiles: every call of the mean, one a tile.
        canvas: ``(h, w)``.

    Raises:
        ValueError: no tile covers any cell of a region.
    """
    cover = torch.stack([tile.cover(canvas) for tile in tiles]).sum(0).to(weights)
    seen = weights * (cover > 0)
    total = seen.sum(-1, keepdim=True)
    if bool((total <= 0).any()):
        raise ValueError("no tile covers a region that is asked for: the model has not run there")
    share = seen / total / cover.clamp_min(torch.finfo(cover.dtype).tiny)
    return [tile.of(share, canvas) for tile in tiles]
