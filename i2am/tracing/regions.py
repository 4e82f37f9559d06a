"""The registered regions of a tracer, as weights on each layer's grid."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from i2am.maps.placed import per_tile
from i2am.maps.sram import Region, RegionOnGrid, region_weights, stack_regions
from i2am.references import Grid
from i2am.tracing.sums import Place
from i2am.tracing.tiles import cell_of, grid_of, placed_at


class RegisteredRegions:
    """Patches of the generated picture that are followed while the model runs.

    Args:
        regions: name → point or mask.
        canvas: where points are given; None: known from the first forward, ``pixels`` per latent pixel.
        pixels: of the output image per latent pixel.
    """

    def __init__(self, regions: Mapping[str, Region], canvas: Grid | None, pixels: int):
        self.names = list(regions)
        self._given = canvas
        self._regions = list(regions.values())
        self._pixels = pixels
        self.restart()
        if canvas is not None or not any(isinstance(r, tuple) for r in self._regions):
            self._read(canvas or (1, 1))  # what can be refused now is

    def restart(self) -> None:
        """Forget the sizes of earlier runs."""
        self.canvas = self._given
        self._on_grid: dict[Grid, Tensor] = {}
        self._all: RegionOnGrid | None = None
        self._first: float | None = None  # timestep of the first tiles
        self._grids: dict[str, dict[Place, Grid]] = {}  # layer → tile → its grid there, as they came
        self._on_tiles: dict[str, dict[Place, Tensor]] | None = None  # from when all tiles are known

    def see(self, latent: Grid) -> None:
        """Note that a forward is about to run on latents of this size."""
        if self.canvas is None:
            self.canvas = (latent[0] * self._pixels, latent[1] * self._pixels)
        if self._all is None:
            self._read(self.canvas)

    def weights(self, grid: Grid) -> Tensor | None:
        """Return ``[1 | B, R, h·w]`` on a layer's grid; None without regions."""
        if not self.names or self._all is None:
            return None
        if grid not in self._on_grid:
            self._on_grid[grid] = self._all(grid)
        return self._on_grid[grid]

    @property
    def unsettled(self) -> bool:
        """True where tiles ran, and it was not yet known that these are all."""
        return bool(self._grids) and self._on_tiles is None

    def follow(self, timestep: float, place: Place) -> bool:
        """Note that a tile is about to run; return whether all tiles of the picture are known by now: those of the
        first step.

        Raises:
            ValueError: a tile that the first step did not have.
        """
        if not self.names or place is None:
            return False
        self._first = timestep if self._first is None else self._first
        if timestep == self._first and self._on_tiles is None:
            return False
        if self._grids and any(place not in grids for grids in self._grids.values()):
            raise ValueError(
                f"a tile at {place} came that the first step did not have: the rows of registered regions (sram=) "
                'are means over the same tiles in every step; trace with record="qk" instead'
            )
        return self._on_tiles is None

    def settle(self, tiles: Mapping[Place, Grid], canvas: Grid) -> None:
        """Find the regions' weights on every layer's tiles.

        Args:
            tiles: place → size in latents.
            canvas: size of the picture's latents.
        """
        self.see(canvas)
        self._on_tiles = {}
        for layer, grids in self._grids.items():
            first = next(iter(grids))
            cell = cell_of(tiles[first], grids[first])
            grid = grid_of(canvas, cell)
            weights = self.weights(grid)
            assert weights is not None, "layers are noted where regions are registered"
            placed = [placed_at(place, cell, own) for place, own in grids.items()]
            self._on_tiles[layer] = dict(zip(grids, per_tile(weights, placed, grid), strict=True))

    def on_tile(self, layer: str, place: Place, grid: Grid) -> Tensor | None:
        """Return ``[1 | B, R, h·w]`` on the grid of a layer's tile; None until all tiles are known."""
        if self._on_tiles is None:
            self._grids.setdefault(layer, {})[place] = grid
            return None
        if place not in self._on_tiles.get(layer, {}):
            raise ValueError(f"layer {layer} did not run on the tile at {place} in the first step: trace without sram=")
        return self._on_tiles[layer][place]

    def _read(self, canvas: Grid) -> None:
        self._all = stack_regions([region_weights(region, canvas) for region in self._regions])
