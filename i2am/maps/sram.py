"""Regions, and the rows of attention behind them: SRAM (Park & Jang, ICLR 2025, section 3.3) and its reverse.

``SRAM_w = Σ_i w[i]·P[i, :] / Σ_i w[i]`` for region weights ``w`` over the generated tokens. Registered regions are
summed while the model runs; any other is answered from recorded queries and keys, in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from i2am._images import is_pil, read_mask, read_point
from i2am.maps.entries import QKEntry
from i2am.maps.placed import per_tile
from i2am.references import Grid

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any  # Pillow is imported where it is needed

MAX_REGIONS = 64
TILE = 1 << 21  # numbers in a tile of probabilities: 8 MiB in float32
CHUNK = 1 << 22  # numbers in the sums over a chunk of heads

Region = Sequence[float] | Tensor | np.ndarray | Image
RegionOnGrid = Callable[[Grid], Tensor]  # grid → [1 | B, R, h·w], each region summing to 1


class Match(NamedTuple):
    """For each generated token, where on the reference it looked. Coordinates are ``(y, x)`` in reference tokens: token
    ``(i, j)`` is centred at ``(i + 0.5, j + 0.5)``; multiply by pixels per token for pixels.
    """

    expected: Tensor  # [B, h, w, 2] mean position under its SRAM
    best: Tensor  # [B, h, w, 2] centre of the strongest reference token
    confidence: Tensor  # [B, h, w] 1 - entropy / log(tokens): 1 when all on one token, 0 when even


def region_weights(region: Region, canvas: Grid) -> RegionOnGrid:
    """Return one region's weights on any grid of the picture.

    Args:
        region: a point ``(y, x)`` on the canvas, any pair of numbers: the token whose cell contains it; or a mask of
            the whole picture (PIL, array or tensor ``[H, W]``; ``[B, H, W]``: one per image) of any resolution,
            area-averaged, soft values kept.
        canvas: ``(height, width)`` in which points are given.

    Raises:
        IndexError: the point is outside the canvas.
        ValueError: the mask is empty, negative, not finite or of wrong rank, or its values have no known meaning.
    """
    point = read_point(region)
    if point is not None:
        return _point(point, canvas)
    given: Any = region
    if not is_pil(region) and np.ndim(given) < 2:
        raise ValueError(f"a region is a point (y, x) or a mask [H, W] or [B, H, W], got shape {np.shape(given)}")
    masks, _ = read_mask(region, weights=True)
    if (masks.flatten(1).sum(1) == 0).any():
        raise ValueError("empty mask: no pixel of the region is set")
    return lambda grid: _normalised(_area_average(masks, grid).flatten(1)[:, None])


def _point(point: tuple[float, float], canvas: Grid) -> RegionOnGrid:
    (y, x), (height, width) = point, canvas
    if not (0 <= y < height and 0 <= x < width):
        raise IndexError(
            f"point (y, x) = ({y:g}, {x:g}) is outside the picture: valid are 0 ≤ y < {height} and 0 ≤ x < {width}"
        )

    def weights(grid: Grid) -> Tensor:
        w = torch.zeros(1, 1, grid[0] * grid[1])
        w[0, 0, int(y * grid[0] / height) * grid[1] + int(x * grid[1] / width)] = 1.0
        return w

    return weights


def stack_regions(parts: Sequence[RegionOnGrid]) -> RegionOnGrid:
    """Join regions into one function of the grid: their ``R`` axes follow each other."""

    def weights(grid: Grid) -> Tensor:
        each = [part(grid) for part in parts]
        B = max(w.shape[0] for w in each)
        return torch.cat([w.expand(B, -1, -1) for w in each], dim=1)

    return weights


def grid_cells(count: Grid) -> RegionOnGrid:
    """Return every cell of a ``count`` grid over the picture as a region, row by row: pooled by area."""

    def weights(grid: Grid) -> Tensor:
        rows, columns = _overlap(count[0], grid[0]), _overlap(count[1], grid[1])
        return torch.einsum("ay,bx->abyx", rows, columns).reshape(1, count[0] * count[1], grid[0] * grid[1])

    return weights


def cells_of(grid: Grid) -> tuple[RegionOnGrid, int]:
    """Return every cell of a grid as a region, and how many there are."""
    if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(f"grid must be (rows, columns), both positive, got {grid!r}")
    return grid_cells(grid), grid[0] * grid[1]


def _area_average(x: Tensor, grid: Grid) -> Tensor:
    """Average ``[B, H, W]`` to ``[B, h, w]``: over each cell's exact area, also where cells cut pixels."""
    return _overlap(grid[0], x.shape[1]) @ x @ _overlap(grid[1], x.shape[2]).T


def _overlap(cells: int, pixels: int) -> Tensor:
    """Return ``[cells, pixels]``: which share of each cell lies on each pixel; rows sum to 1."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    pixel = torch.arange(pixels, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return (shared.clamp_min(0) * cells / pixels).float()


def _normalised(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- rows


def region_rows(entry: QKEntry, weights: Tensor, heads: list[int], *, reverse: bool = False) -> Tensor:
    """Pool rows of probabilities of one recorded call over regions, in tiles.

    Args:
        entry: the call.
        weights: ``[1 | B, R, Q]`` over its queries, or ``[1 | B, R, K]`` over its reference keys when ``reverse``.
        heads: which ones.
        reverse: column probabilities: where each region of the reference went.

    Returns: ``[B, R, heads, K]`` (``Q`` when reverse).
    """
    x = entry.read()
    rows, others, lse, mask = x["q"], x["k"], x["row_lse"], x.get("mask")
    if reverse:
        rows, others, lse = x["k"], x["q"], x["col_lse"]
        mask = None if mask is None else mask.transpose(-1, -2)
    rows, others, lse = rows[:, heads], others[:, heads], lse[:, heads]
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    B, H, N = rows.shape[0], len(heads), others.shape[2]
    others = others.to(dtype).transpose(-1, -2)
    weights = weights.to(others)
    total = others.new_zeros(B, H, weights.shape[1], N)
    active = weights.flatten(0, 1).any(0).nonzero().squeeze(1)
    for tokens in torch.split(active, max(TILE // (B * H * N), 1)):
        s = (rows[:, :, tokens].to(dtype) * entry.scale) @ others  # [B, H, tile, N]
        if mask is not None:
            s = _masked(s, mask, tokens, heads)
        s -= lse[:, :, tokens, None].masked_fill(lse[:, :, tokens, None].isneginf(), math.inf)
        total += weights[:, None, :, tokens] @ s.exp_()
    return total.transpose(1, 2)


def rows_of_calls(
    entries: Sequence[QKEntry], grid: Grid, weights: Tensor, heads: list[int], total: Tensor, *, reverse: bool = False
) -> Tensor:
    """Sum the pooled rows of a layer's calls; of tiles, as many times their mean on the whole picture.

    Args:
        entries: the calls of one time group.
        grid: of the whole picture.
        weights, heads, reverse: as in :func:`region_rows`, over the whole picture or reference.
        total: ``[B, R, heads, N]`` of zeros, to sum in.

    Raises:
        ValueError: no tile covers a region, or each tile has a reference of its own and ``reverse`` asks for one.
    """
    tiles = [entry.tile for entry in entries if entry.tile is not None]
    if not tiles:
        for entry in entries:
            total += region_rows(entry, weights, heads, reverse=reverse).cpu()
        return total
    if not reverse:
        for entry, tile, own in zip(entries, tiles, per_tile(weights, tiles, grid), strict=True):
            rows = region_rows(entry, own, heads).cpu()
            total += rows if rows.shape[-1] == total.shape[-1] else tile.onto(rows, grid)  # of a tile's own reference
        return total * len(tiles)
    for entry, tile in zip(entries, tiles, strict=True):
        if entry.read()["k"].shape[2] != weights.shape[-1]:
            raise ValueError(
                "each tile has a reference of its own, so that a piece of the whole was looked at by some tiles alone: "
                "ask where a patch of the picture looked, sram(…)"
            )
        total += tile.onto(region_rows(entry, weights, heads, reverse=True).cpu(), grid)
    cover = torch.stack([tile.cover(grid) for tile in tiles]).sum(0)
    return torch.where(cover > 0, total / cover.clamp_min(torch.finfo(cover.dtype).tiny), 0.0) * len(tiles)


def _masked(s: Tensor, mask: Tensor, tokens: Tensor, heads: list[int]) -> Tensor:
    """Apply to a tile of logits its part of a mask that broadcasts to ``[B, H, rows, N]``."""
    mask = mask[:, heads] if mask.shape[1] > 1 else mask
    mask = mask[:, :, tokens] if mask.shape[2] > 1 else mask
    return s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask


def heads_at_once(regions: int, batch: int, tokens: int) -> int:
    """Return how many heads fit a chunk of sums."""
    return max(CHUNK // (regions * batch * tokens), 1)


def match(sram: Tensor) -> Match:
    """Return positions and confidence of SRAM maps ``[B, Q, h, w]``; of shape ``[B, Q, …]``."""
    h, w = sram.shape[-2:]
    p = sram.flatten(2)
    p = p / p.sum(-1, keepdim=True)
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    positions = torch.stack([y, x], dim=-1).reshape(h * w, 2)
    entropy = torch.special.entr(p).sum(-1)
    return Match(p @ positions, positions[p.argmax(-1)], 1 - entropy / math.log(h * w))
