"""The registered regions of a tracer, as weights on each layer's grid."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from i2am.maps.sram import Region, RegionOnGrid, region_weights, stack_regions
from i2am.references import Grid


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

    def _read(self, canvas: Grid) -> None:
        self._all = stack_regions([region_weights(region, canvas) for region in self._regions])
