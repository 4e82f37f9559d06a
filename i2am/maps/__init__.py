"""``AttributionMaps``: what a traced run says, at the levels of I2AM and for any patch; saved and loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from i2am.maps.aggregate import (
    CachedSource,
    LayerSums,
    RecordedRegions,
    RegisteredRegion,
    area,
    check_reference_grid,
    grid_of,
    not_finite_message,
)
from i2am.maps.budget import Budget, read_budget
from i2am.maps.display import as_html
from i2am.maps.entries import QKEntry
from i2am.maps.export import as_pandas, as_xarray
from i2am.maps.file import Contents, read_maps, write_maps
from i2am.maps.frames import PICTURE, FramedLayers, Video
from i2am.maps.names import AXES, DIRECTIONS, LEVELS, Axis, Direction, Level, Normalize
from i2am.maps.provenance import plain, summary_lines
from i2am.maps.reading import Options
from i2am.maps.sram import (
    MAX_REGIONS,
    Match,
    Region,
    RegionOnGrid,
    cells_of,
    match,
    region_weights,
    stack_regions,
)
from i2am.references import Grid, LayerFilter

if TYPE_CHECKING:
    import pandas
    import xarray
    from typing_extensions import Self, Unpack


__all__ = ["AXES", "DIRECTIONS", "LEVELS", "AttributionMaps", "Axis", "Direction", "LayerSums", "Level", "Normalize"]

logger = logging.getLogger("i2am")

REVERSE = "map of where a place of the reference went"  # for errors


class AttributionMaps(FramedLayers):
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

    def __init__(
        self,
        sums: Sequence[LayerSums],
        *,
        canvas: Grid | None = None,
        regions: Sequence[str] = (),
        entries: Sequence[QKEntry] = (),
        provenance: Mapping[str, Any] | None = None,
        video: Video = PICTURE,
    ):
        super().__init__(sums, regions, canvas=canvas, entries=entries, video=video)
        self._provenance = plain(provenance)

    def _of(self, sums: Sequence[LayerSums], entries: Sequence[QKEntry], canvas: Grid | None) -> Self:
        return type(self)(sums, canvas=canvas, regions=self.regions, entries=entries, provenance=self._provenance)

    @classmethod
    def of(cls, sums: Iterable[LayerSums], default: set[str], **extra: Any) -> AttributionMaps:
        """Copy a recorder's running sums; ``default`` names the layers of the default set."""
        maps = cls([s.frozen(s.layer in default) for s in sums], **extra)
        for reference in maps.references:
            if broken := maps.not_finite(reference):
                logger.warning("%s", not_finite_message(broken, reference))
        return maps

    # ---------------------------------------------------------------------------------------------------- contents

    @property
    def recorded(self) -> bool:
        """True where any patch can be asked: queries and keys were kept."""
        return bool(self._entries)

    @property
    def one_group_a_step(self) -> bool:
        """True where each time group is one denoising step, as the tracer saw the run."""
        return bool(self._provenance.get("steps") == self.time_groups)

    @property
    def provenance(self) -> dict[str, Any]:
        """Account of what the maps are a mean of, as the tracer saw it: plain JSON values; empty where nobody told."""
        return self._provenance

    def __repr__(self) -> str:
        references = ", ".join(repr(name) for name in self.references)
        first = (
            f"AttributionMaps({len(self.recorded_layers)} layers, references {references}, batch {self.batch}, "
            f"{self.time_groups} time groups)"
        )
        return "\n  ".join([first, *summary_lines(self._provenance)])

    # ------------------------------------------------------------------------------------------------------ levels

    def ulam(self, direction: Direction, **options: Unpack[Options]) -> Tensor:
        """Return the unified map ``[B, h, w]``: over all chosen times, heads and layers. Options: see the class."""
        return self._read(direction, None, **options)

    def tlam(self, direction: Direction, **options: Unpack[Options]) -> Tensor:
        """Return time-level maps ``[B, T, h, w]``, one a chosen time group; NaN for a group in which nothing ran."""
        return self._read(direction, "time", **options)

    def hlam(self, direction: Direction, **options: Unpack[Options]) -> Tensor:
        """Return head-level maps ``[B, H, h, w]``. Raises ValueError, naming the layers, where head counts differ."""
        return self._read(direction, "head", **options)

    def llam(self, direction: Direction, **options: Unpack[Options]) -> Tensor:
        """Return layer-level maps ``[B, L, h, w]`` in the order of ``maps.layers`` (or of the chosen ones)."""
        return self._read(direction, "layer", **options)

    def budget(
        self,
        region: Region | None = None,
        *,
        canvas: Grid | None = None,
        sources: Sequence[str] | None = None,
        layers: LayerFilter = None,
    ) -> Budget:
        """Return on what the generated picture, or a place of it, spends its attention, by time group and layer.

        Args:
            region: a point ``(y, x)`` or a mask of the generated picture. None: all of it.
            canvas: as in :meth:`sram`.
            sources: which of ``maps.sources``; they must share one attention call. None: all.
            layers: as at every level.

        Returns:
            a :class:`i2am.maps.budget.Budget`, drawn by :func:`i2am.plot.budget`.

        Raises:
            ValueError: the sources have attention calls of their own (an adapter beside the text), or are all there is.
        """
        return read_budget(self, region, canvas or self.canvas, sources, layers, self.one_group_a_step)

    def to_xarray(self, direction: Direction, level: str = "ulam", **options: Unpack[Options]) -> xarray.DataArray:
        """Return a level as an ``xarray.DataArray`` with named axes ``image, (time | head | layer,) y, x``.

        ``y`` and ``x`` are places on the picture, 0…1, at the tokens' centres. Needs xarray.

        Args:
            direction: "r2g", "g2r" or "mass".
            level: "ulam", "tlam", "hlam" or "llam".
            options: as at every level, see the class.

        Raises:
            ImportError: xarray is not installed.
            ValueError: there is no such level or map.
        """
        return as_xarray(self, direction, level, dict(options))

    def to_pandas(self, direction: Direction, level: str = "ulam", **options: Unpack[Options]) -> pandas.DataFrame:
        """Return a level as a long table, a row a token: ``image, (time | head | layer,) y, x, value``.

        ``y`` and ``x`` are rows and columns of the map. Needs pandas; arguments as :meth:`to_xarray`.
        """
        return as_pandas(self, direction, level, dict(options))

    # -------------------------------------------------------------------------------------------------------- SRAM

    def sram(
        self,
        region: str | Region,
        *,
        canvas: Grid | None = None,
        level: Axis | None = None,
        **options: Unpack[Options],
    ) -> Tensor:
        """Return the reference regions behind one patch of the generated image: ``[B, h_ref, w_ref]``.

        Args:
            region: a point ``(y, x)``, a mask of the generated picture (soft values are weights), or the name of a
                region registered with ``trace(sram=...)``. All but names need ``trace(record="qk")``.
            canvas: ``(height, width)`` in which points are given. None: ``maps.canvas``, the pixels of the generated
                image where a pipeline was traced, else the latent grid.
            level: None: unified; "time", "head" or "layer": one map each, ``[B, T | H | L, h_ref, w_ref]``.
            options: as at every level, see the class.

        Raises:
            IndexError: a point outside the picture.
            ValueError: an empty mask; a reference without a grid; nothing recorded that could answer.
        """
        if isinstance(region, str):
            return self._read("g2r", level, source=RegisteredRegion(self._region(region)), **options)
        weights = region_weights(region, canvas or self.canvas)
        return self._read("g2r", level, source=self._recorded(weights, 1), **options)

    def where_did_it_go(
        self,
        region: Region,
        *,
        canvas: Grid | None = None,
        level: Axis | None = None,
        **options: Unpack[Options],
    ) -> Tensor:
        """Return where in the generated image a piece of the reference went, ``[B, h, w]``: SRAM in reverse.

        Column probabilities, ``Σ_j w[j]·C[:, j] / Σ_j w[j]`` over the chosen reference tokens.

        Args:
            region: a point ``(y, x)`` or a mask of the reference.
            canvas: ``(height, width)`` in which points are given. None: the (largest) reference grid.
            level, options, raises: as :meth:`sram`.
        """
        sums = self._chosen(self._reference(options.get("reference")), options.get("layers"))
        check_reference_grid(sums, REVERSE)
        weights = region_weights(region, canvas or max((grid_of(s, "g2r") for s in sums), key=area))
        return self._read("r2g", level, source=self._recorded(weights, 1, reverse=True), **options)

    def correspondence(
        self,
        grid: Grid = (16, 16),
        *,
        level: Axis | None = None,
        reverse: bool = False,
        **options: Unpack[Options],
    ) -> Tensor:
        """Return SRAM of every cell of a grid over the generated image: ``[B, cells, h_ref, w_ref]``, row by row.

        Args:
            grid: ``(rows, columns)``.
            level: as :meth:`sram`; its axis comes after the cells'.
            reverse: where every cell of a grid over the *reference* went, ``[B, cells, h, w]``.
            options, raises: as :meth:`sram`.
        """
        return self._regions(*cells_of(grid), level=level, reverse=reverse, **options)

    def correspondences(self, grid: Grid = (16, 16), *, reverse: bool = False) -> Callable[..., Tensor]:
        """Return :meth:`correspondence` for many questions: ``ask(level=, layers=, times=, heads=, …)``.

        The attention of a layer is recomputed once, for all its heads and times, and remembered until another layer is
        asked: go layer by layer.
        """
        weights, count = cells_of(grid)
        source = CachedSource(self._recorded(weights, count, reverse))

        def ask(*, level: Axis | None = None, **options: Unpack[Options]) -> Tensor:
            maps = self._read("r2g" if reverse else "g2r", level, source=source, **options)
            return torch.unflatten(maps, 0, (self.batch, count))

        return ask

    def match(self, **options: Unpack[Options]) -> Match:
        """Return for each generated token of the finest chosen grid, where on the reference it looked, and how surely.

        See :class:`i2am.maps.sram.Match` for shapes and units.
        """
        sums = self._chosen(self._reference(options.get("reference")), options.get("layers"))
        grid = max((s.grid for s in sums), key=area)
        points = [(y + 0.5, x + 0.5) for y in range(grid[0]) for x in range(grid[1])]
        tiles = []
        for start in range(0, len(points), MAX_REGIONS):
            tile = [region_weights(p, grid) for p in points[start : start + MAX_REGIONS]]
            tiles.append(match(self._regions(stack_regions(tile), len(tile), **options)))
        return Match(*(torch.unflatten(torch.cat(x, dim=1), 1, grid) for x in zip(*tiles, strict=True)))

    @property
    def canvas(self) -> Grid:
        """``(height, width)`` in which points on the generated image are given."""
        return self._canvas or max((s.grid for s in self._sums), key=area)

    def _regions(
        self,
        weights: RegionOnGrid,
        count: int,
        *,
        level: Axis | None = None,
        reverse: bool = False,
        **options: Unpack[Options],
    ) -> Tensor:
        """Return ``[B, count, (T | H | L,) h, w]``."""
        if reverse:
            check_reference_grid(
                self._chosen(self._reference(options.get("reference")), options.get("layers")), REVERSE
            )
        source = self._recorded(weights, count, reverse)
        maps = self._read("r2g" if reverse else "g2r", level, source=source, **options)
        return torch.unflatten(maps, 0, (self.batch, count))

    def _region(self, name: str) -> int:
        if name not in self.regions:
            there = ", ".join(self.regions) or "none"
            raise ValueError(f"no region {name!r} was registered with trace(sram=...); there are: {there}")
        return self.regions.index(name)

    def _recorded(self, weights: RegionOnGrid, count: int, reverse: bool = False) -> RecordedRegions:
        if not self._entries:
            raise ValueError(
                "these maps keep no queries and keys (a forward that fails half-way leaves none): trace with "
                'record="qk" to ask any patch afterwards, or register patches beforehand with sram={"name": (y, x)}'
            )
        return RecordedRegions(self._entries, weights, count, reverse)

    # ----------------------------------------------------------------------------------------------------- looking

    def report(
        self, path: str | os.PathLike[str], generated: Any = None, reference: Any = None, **options: Any
    ) -> Path:
        """Write one self-contained, interactive HTML file (no server, no network) and return its path.

        Pointing at a place of the generated image shows the reference regions behind it (SRAM), and the reverse, for
        every time group, head and layer; without recorded queries and keys there are the maps of all levels.

        Args:
            path: of the file.
            generated, reference: the images; forms: see :func:`i2am.plot.overlay`. None: the maps on plain grey.
            mask, reference_mask: the inpainted region of the generated image and the object's on the reference: they
                are outlined and scored (IMACS, box IoU).
            reference_name: which of ``maps.references``, where there are several.
            index: which image of a batch.
            layers: as at every level.
            detail: how many of time, head and layer can be picked at once, 0…3. None: as many as fit.
            limit: of the file's size, "15MB" or bytes.
            title, settings: written into the page; settings are names and values.
            progress: whether to show a bar.

        Raises:
            ValueError: images and maps alone take more than the limit; arguments that no level would take.
        """
        from i2am.report import build_report

        return build_report(self, path, generated, reference, **options)

    def _repr_png_(self) -> bytes:
        from i2am.plot import thumbnail

        return thumbnail(self)

    def _repr_html_(self) -> str:
        return as_html(self, self._repr_png_())

    # ------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str], *, embed: bool = False, record: bool = True) -> Path:
        """Write the maps as safetensors, at once or not at all; return the path.

        A record in memory goes into the file. A record on disk stays in its folder and the file refers to it, relative
        to its own place, unless ``embed``. ``record=False`` leaves it out: the levels stay, patches can't be asked.
        """
        path = Path(path)
        entries = self._entries if record else []
        contents = Contents(list(self._sums), self._canvas, self.regions, entries, self._provenance, self._video)
        write_maps(path, contents, embed)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, record_anywhere: bool = False) -> AttributionMaps:
        """Read what :meth:`save` wrote; recorded queries and keys are read only when a patch is asked.

        Args:
            path: of the file.
            record_anywhere: read the files of a record also where they lie outside the maps file's own folder. A file
                from somebody else should not choose what is opened on your disk.

        Raises:
            FileNotFoundError: there is no such file, or the record it refers to has gone.
            ValueError: it, or its record, is truncated, malformed or not an i2am file; names the file and the field.
        """
        contents = read_maps(Path(path), record_anywhere)
        return cls(
            contents.sums,
            canvas=contents.canvas,
            regions=contents.regions,
            entries=contents.entries,
            provenance=contents.provenance,
            video=contents.video,
        )
