"""``AttributionMaps``: what a traced run says, at the levels of I2AM and for any patch; saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from i2am._files import write_atomically
from i2am.maps.aggregate import (
    LayerSums,
    Levels,
    Picks,
    RecordedRegions,
    RegisteredRegion,
    Remembered,
    RunningSums,
    Source,
    area,
    check_direction,
    check_heads,
    check_reference_grid,
    grid_of,
    pick,
)
from i2am.maps.entries import Entry, pack
from i2am.maps.sram import MAX_REGIONS, Match, Region, Weights, cells, match, region_weights, several
from i2am.references import Grid, LayerFilter, choose_layers

if TYPE_CHECKING:
    from i2am.tracing.sums import Track

DIRECTIONS = ("r2g", "g2r", "mass")
NORMALIZE = ("raw", "lift")
STORED = (*DIRECTIONS, "sram")
LEVELS = (None, "time", "head", "layer")
FORMAT = "i2am-maps-1"


class AttributionMaps:
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
        entries: Sequence[Entry] = (),
    ):
        if not sums:
            raise ValueError("no maps without a recorded layer")
        self._sums = tuple(sums)
        self._canvas = canvas
        self._entries = list(entries)
        self.regions = list(regions)

    @classmethod
    def of(cls, tracks: Iterable[Track], default: set[str], **extra) -> AttributionMaps:
        """A copy of a recorder's running sums; ``default`` names the layers of the default set."""
        return cls(
            [
                LayerSums(
                    layer=t.layer,
                    reference=t.reference.name,
                    grid=t.grid,
                    reference_grid=t.reference.grid,
                    skip=t.reference.skip,
                    keys=t.keys,
                    default=t.layer in default,
                    counts=tuple(t.counts),
                    **{name: _copy(getattr(t, name)) for name in STORED},
                )
                for t in tracks
            ],
            **extra,
        )

    # ---------------------------------------------------------------------------------------------------- contents

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
        """Names of the references; with several, each level needs ``reference=``."""
        return _unique(s.reference for s in self._sums)

    @property
    def time_groups(self) -> int:
        return self._sums[0].r2g.shape[0]

    @property
    def batch(self) -> int:
        """Number of images."""
        return self._sums[0].r2g.shape[1]

    def counts(self, reference: str | None = None) -> dict[str, list[int]]:
        """Attention calls seen per layer, one number a time group."""
        name = self._reference(reference)
        return {s.layer: list(s.counts) for s in self._sums if s.reference == name}

    def grids(self, reference: str | None = None) -> dict[str, Grid]:
        """Each layer's own generated grid ``(height, width)``."""
        name = self._reference(reference)
        return {s.layer: s.grid for s in self._sums if s.reference == name}

    def heads(self, reference: str | None = None) -> dict[str, int]:
        """Each layer's number of heads."""
        name = self._reference(reference)
        return {s.layer: s.heads for s in self._sums if s.reference == name}

    @property
    def recorded(self) -> bool:
        """Whether any patch can be asked: queries and keys were kept."""
        return bool(self._entries)

    def __repr__(self) -> str:
        references = ", ".join(repr(name) for name in self.references)
        return (
            f"AttributionMaps({len(self.recorded_layers)} layers, references {references}, batch {self.batch}, "
            f"{self.time_groups} time groups)"
        )

    # ------------------------------------------------------------------------------------------------------ levels

    def ulam(self, direction: str, **options) -> Tensor:
        """Unified map ``[B, h, w]``: over all chosen times, heads and layers. Options: see the class."""
        return self._read(direction, None, **options)

    def tlam(self, direction: str, **options) -> Tensor:
        """Time-level maps ``[B, T, h, w]``, one a chosen time group; NaN for a group in which nothing ran."""
        return self._read(direction, "time", **options)

    def hlam(self, direction: str, **options) -> Tensor:
        """Head-level maps ``[B, H, h, w]``. Raises ValueError, naming the layers, where head counts differ."""
        return self._read(direction, "head", **options)

    def llam(self, direction: str, **options) -> Tensor:
        """Layer-level maps ``[B, L, h, w]`` in the order of ``maps.layers`` (or of the chosen ones)."""
        return self._read(direction, "layer", **options)

    # -------------------------------------------------------------------------------------------------------- SRAM

    def sram(self, region: str | Region, *, canvas: Grid | None = None, level: str | None = None, **options) -> Tensor:
        """The reference regions behind one patch of the generated image: ``[B, h_ref, w_ref]``.

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
        self, region: Region, *, canvas: Grid | None = None, level: str | None = None, **options
    ) -> Tensor:
        """SRAM in reverse: where in the generated image a piece of the reference went, ``[B, h, w]``.

        Column probabilities, ``Σ_j w[j]·C[:, j] / Σ_j w[j]`` over the chosen reference tokens.

        Args:
            region: a point ``(y, x)`` or a mask of the reference.
            canvas: ``(height, width)`` in which points are given. None: the (largest) reference grid.
            level, options, raises: as :meth:`sram`.
        """
        sums = self._chosen(self._reference(options.get("reference")), options.get("layers"))
        check_reference_grid(sums[0], "map of where a place of the reference went")
        weights = region_weights(region, canvas or max((s.reference_grid for s in sums), key=area))
        return self._read("r2g", level, source=self._recorded(weights, 1, reverse=True), **options)

    def correspondence(
        self, grid: Grid = (16, 16), *, level: str | None = None, reverse: bool = False, **options
    ) -> Tensor:
        """SRAM of every cell of a grid over the generated image: ``[B, rows·columns, h_ref, w_ref]``, row by row.

        Args:
            grid: ``(rows, columns)``.
            level: as :meth:`sram`; its axis comes after the cells'.
            reverse: where every cell of a grid over the *reference* went, ``[B, rows·columns, h, w]``.
            options, raises: as :meth:`sram`.
        """
        return self._regions(*_cells(grid), level=level, reverse=reverse, **options)

    def correspondences(self, grid: Grid = (16, 16), *, reverse: bool = False) -> Callable[..., Tensor]:
        """:meth:`correspondence` for many questions: ``ask(level=, layers=, times=, heads=, …)``.

        The attention of a layer is recomputed once, for all its heads and times, and remembered until another layer is
        asked: go layer by layer.
        """
        weights, count = _cells(grid)
        source = Remembered(self._recorded(weights, count, reverse))

        def ask(*, level: str | None = None, **options) -> Tensor:
            maps = self._read("r2g" if reverse else "g2r", level, source=source, **options)
            return maps.unflatten(0, (self.batch, count))

        return ask

    def match(self, **options) -> Match:
        """For each generated token of the finest chosen grid, where on the reference it looked, and how surely.

        See :class:`i2am.maps.sram.Match` for shapes and units.
        """
        sums = self._chosen(self._reference(options.get("reference")), options.get("layers"))
        grid = max((s.grid for s in sums), key=area)
        points = [(y + 0.5, x + 0.5) for y in range(grid[0]) for x in range(grid[1])]
        tiles = []
        for start in range(0, len(points), MAX_REGIONS):
            tile = [region_weights(p, grid) for p in points[start : start + MAX_REGIONS]]
            tiles.append(match(self._regions(several(tile), len(tile), **options)))
        return Match(*(torch.cat(x, dim=1).unflatten(1, grid) for x in zip(*tiles, strict=True)))

    @property
    def canvas(self) -> Grid:
        """``(height, width)`` in which points on the generated image are given."""
        return self._canvas or max((s.grid for s in self._sums), key=area)

    def _regions(self, weights: Weights, count: int, *, level: str | None = None, reverse: bool = False, **options):
        """``[B, count, (T | H | L,) h, w]``."""
        if reverse:
            s = self._chosen(self._reference(options.get("reference")), options.get("layers"))[0]
            check_reference_grid(s, "map of where a place of the reference went")
        source = self._recorded(weights, count, reverse)
        maps = self._read("r2g" if reverse else "g2r", level, source=source, **options)
        return maps.unflatten(0, (self.batch, count))

    def _region(self, name: str) -> int:
        if name not in self.regions:
            there = ", ".join(self.regions) or "none"
            raise ValueError(f"no region {name!r} was registered with trace(sram=...); there are: {there}")
        return self.regions.index(name)

    def _recorded(self, weights: Weights, count: int, reverse: bool = False) -> RecordedRegions:
        if not self._entries:
            raise ValueError(
                'these maps keep no queries and keys: trace with record="qk" to ask any patch afterwards, or register '
                'patches beforehand with sram={"name": (y, x)}'
            )
        return RecordedRegions(self._entries, weights, count, reverse)

    # ------------------------------------------------------------------------------------------------------ reading

    def _read(
        self,
        direction: str,
        level: str | None,
        *,
        reference: str | None = None,
        layers: LayerFilter = None,
        heads: Picks = None,
        times: Picks = None,
        size: Grid | None = None,
        normalize: str = "raw",
        source: Source | None = None,
    ) -> Tensor:
        """One level: ``[B, h, w]``, or ``[B, T | H | L, h, w]``."""
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(map(str, LEVELS))}, got {level!r}")
        sums = self._chosen(self._reference(reference), layers)
        check_direction(direction, sums, source)
        if level == "head":
            check_heads(sums)
        if size is None:
            size = max((grid_of(s, direction) for s in sums), key=area)
        elif len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"size must be (height, width), both positive, got {size!r}")
        levels = Levels(
            direction=direction,
            sums=sums,
            source=source or RunningSums(direction),
            times=pick(times, self.time_groups, "times"),
            heads=heads,
            size=tuple(size),
            lift=normalize == "lift",
            level=level,
        )
        if level == "layer":
            return torch.cat([maps for maps, _ in levels], dim=1)
        maps = levels.mean_layers()
        return maps[:, 0] if level is None else maps

    def _reference(self, reference: str | None) -> str:
        names = self.references
        if reference is None and len(names) == 1:
            return names[0]
        if reference not in names:
            what = "several references: pass reference=" if reference is None else f"no reference {reference!r}:"
            raise ValueError(f"{what} one of {', '.join(repr(n) for n in names)}")
        return reference

    def _chosen(self, reference: str, layers: LayerFilter) -> list[LayerSums]:
        of_reference = {s.layer: s for s in self._sums if s.reference == reference}
        if layers is None:
            chosen = [name for name in of_reference if of_reference[name].default] or list(of_reference)
        else:
            chosen = choose_layers(of_reference, layers)
        return [of_reference[name] for name in chosen]

    # ----------------------------------------------------------------------------------------------------- looking

    def report(self, path: str | os.PathLike, generated: Any = None, reference: Any = None, **options) -> Path:
        """Writes one self-contained, interactive HTML file (no server, no network) and returns its path.

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
        """ULAM in both directions, as notebooks show it."""
        from i2am.plot import thumbnail

        return thumbnail(self)

    def _repr_html_(self) -> str:
        """What was recorded and its ULAMs, as notebooks show it."""
        import html
        from base64 import b64encode

        rows = {
            "references": ", ".join(self.references),
            "layers": f"{len(self.layers)} of {len(self.recorded_layers)} recorded",
            "time groups": self.time_groups,
            "images": self.batch,
            "any patch can be asked": "yes" if self.recorded else 'no (trace with record="qk")',
        }
        table = "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
        alt = "Unified attribution maps: R2G on the generated grid and, where there is one, G2R on the reference grid"
        picture = f'<img alt="{alt}" src="data:image/png;base64,{b64encode(self._repr_png_()).decode()}">'
        return f"<table><caption>AttributionMaps</caption>{table}</table>{picture}"

    # ------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike, *, embed: bool = False, record: bool = True) -> Path:
        """Writes the maps as safetensors, at once or not at all; returns the path.

        A record in memory goes into the file. A record on disk stays in its folder and the file refers to it, relative
        to its own place, unless ``embed``. ``record=False`` leaves it out: the levels stay, patches can't be asked.
        """
        from safetensors.torch import save_file

        path = Path(path)
        contents, layers = {}, []
        for i, s in enumerate(self._sums):
            contents |= {f"{i}.{name}": getattr(s, name) for name in STORED if getattr(s, name) is not None}
            layers.append({f.name: getattr(s, f.name) for f in fields(s) if f.name not in STORED})
        kept = _RecordFile.pack(self._entries if record else [], path, embed)
        header = {"layers": layers, "canvas": self._canvas, "regions": self.regions, "record": kept.header}
        contents = {name: x.contiguous() for name, x in (contents | kept.contents).items()}
        write_atomically(
            path, lambda file: save_file(contents, file, metadata={"format": FORMAT, "maps": json.dumps(header)})
        )
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> AttributionMaps:
        """Reads what :meth:`save` wrote; recorded queries and keys are read only when a patch is asked.

        Raises:
            FileNotFoundError: there is no such file, or the record it refers to has gone.
            ValueError: it, or its record, is truncated or not an i2am file.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no maps file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a maps file of i2am (format {metadata.get('format')!r})")
                names = [n for n in file.keys() if not n.startswith(_RecordFile.PREFIX)]  # noqa: SIM118 (not a dict)
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        header = json.loads(metadata["maps"])
        sums = [
            LayerSums(
                **{name: tuple(x) if isinstance(x, list) else x for name, x in layer.items()},
                **{name: tensors.get(f"{i}.{name}") for name in STORED},
            )
            for i, layer in enumerate(header["layers"])
        ]
        canvas = tuple(header["canvas"]) if header["canvas"] else None
        entries = _RecordFile.unpack(header["record"], path)
        return cls(sums, canvas=canvas, regions=header["regions"], entries=entries)


class _RecordFile(NamedTuple):
    """A record as part of a maps file: embedded tensors, and a header that says which entry is where."""

    PREFIX = "record."

    contents: dict[str, Tensor]
    header: dict

    @classmethod
    def pack(cls, entries: list[Entry], path: Path, embed: bool) -> _RecordFile:
        def embedded(e: Entry) -> bool:
            return embed or e.file is None or e.file.resolve() == path.resolve()

        inside = [replace(e, tensors=e.read(), file=None) if embedded(e) else e for e in entries]
        contents, keys = pack([e for e in inside if e.file is None], cls.PREFIX)
        of_memory = iter(keys)
        listing, files = [], {}
        for e in inside:
            file = None if e.file is None else os.path.relpath(e.file.resolve(), path.resolve().parent)
            if file is not None:
                files[file] = e.file.stat().st_size
            listing.append([e.layer, e.reference, e.group, e.scale, file, e.keys if file else next(of_memory)])
        return cls(contents, {"entries": listing, "files": files})

    @classmethod
    def unpack(cls, header: dict, path: Path) -> list[Entry]:
        for name, size in header["files"].items():
            file = path.parent / name
            if not file.is_file():
                raise FileNotFoundError(f"{path} refers to the record {file}, which is not there")
            if file.stat().st_size != size:
                raise ValueError(f"the record {file} is truncated: {file.stat().st_size} bytes of {size}")
        return [
            Entry(layer, reference, group, scale, file=path.parent / file if file else path, keys=keys)
            for layer, reference, group, scale, file, keys in header["entries"]
        ]


def _cells(grid: Grid) -> tuple[Weights, int]:
    """Weights of every cell of a grid, and how many there are."""
    if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(f"grid must be (rows, columns), both positive, got {grid!r}")
    return cells(grid), grid[0] * grid[1]


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to("cpu", copy=True)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
