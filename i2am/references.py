"""Which tokens of an attention call are generated, which encode the reference, and on which grids they lie."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int]
SELF = "self"  # the name of maps that are spatial self-attention, and not reference attribution
TEXT = "text"  # the name of the prompt's tokens among the keys
Kind = Literal["reference", "word", "text", "self"]  # what a set of keys is
KINDS: tuple[Kind, ...] = get_args(Kind)
QUERIES = "queries"
LayerFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class Reference:
    """The keys of a cross-attention that encode a reference image.

    Args:
        grid: ``(height, width)`` of the reference tokens; or "queries": the same as the generated tokens', at every
            resolution (features of a second branch); or None when they have no 2-D layout (a pooled embedding, a
            resampler's tokens): then there is no map *on* the reference (G2R, SRAM), but R2G works.
        tokens: the keys that encode the reference: slice, bool mask or indices.
        skip: how many leading ones of them are not on the grid (CLIP's class token: 1). They take part in every softmax
            and are dropped before drawing.
        name: how the maps call it.
        call: where an attention module makes several calls, which of them has these keys, counted from 0; ``tokens``
            then counts among that call's keys. None: the call whose number of keys is that of the module's context.
    """

    grid: Grid | str | None = None
    tokens: slice | Tensor | Sequence[int] = field(default_factory=lambda: slice(None))
    skip: int = 0
    name: str = "reference"
    call: int | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid != QUERIES:
            grid = tuple(self.grid)
            if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
                raise ValueError(
                    f'Reference.grid must be (height, width) in tokens, both positive, or "queries", got {self.grid!r}'
                )
            object.__setattr__(self, "grid", grid)
        if not isinstance(self.skip, int) or self.skip < 0:
            raise ValueError(f"Reference.skip must be a non-negative number of tokens, got {self.skip!r}")
        if self.call is not None and (isinstance(self.call, bool) or not isinstance(self.call, int) or self.call < 0):
            raise ValueError(
                f"Reference.call must be the number of an attention call, counted from 0, got {self.call!r}"
            )

    def on(self, grid: Grid) -> Reference:
        """Return this reference for generated tokens on ``grid``."""
        return replace(self, grid=grid) if self.grid == QUERIES else self

    def count(self, length: int) -> int:
        """Return how many of ``length`` keys are this reference's."""
        if isinstance(self.tokens, slice):
            return len(range(length)[self.tokens])
        tokens = torch.as_tensor(self.tokens)
        return int(tokens.sum()) if tokens.dtype == torch.bool else tokens.numel()

    def check(self, length: int) -> None:
        """Refuse an attention of ``length`` keys that this description does not fit."""
        count = self.count(length)
        if count == 0:
            raise ValueError(f"reference {self.name!r}: tokens={self.tokens} selects none of the {length} keys")
        grid = None if isinstance(self.grid, str) else self.grid
        if grid is not None and self.skip + grid[0] * grid[1] != count:
            h, w = grid
            raise ValueError(
                f"reference {self.name!r}: grid {h}×{w} after skip={self.skip} makes {self.skip + h * w} tokens, but "
                f"{count} of the {length} keys are selected; adjust grid, skip (1 for a leading class token) or tokens"
            )


@dataclass(frozen=True)
class KeySet(Reference):
    """Keys beside the references that are told apart: a word's tokens, the text, the picture itself."""

    kind: Kind = "word"


@dataclass(frozen=True)
class Concatenated:
    """The latents hold several pictures beside each other, the generated one and references (CatVTON, DreamLite).

    Args:
        axis: along which they are joined, "height" or "width".
        parts: how many equal parts there are.
        generated: which of them is the generated one, counted from the top or left; the others are references.
    """

    axis: str = "height"
    parts: int = 2
    generated: int = 0

    def __post_init__(self) -> None:
        if self.axis not in ("height", "width"):
            raise ValueError(f'Concatenated.axis must be "height" or "width", got {self.axis!r}')
        if not isinstance(self.parts, int) or self.parts < 2:
            raise ValueError(f"Concatenated.parts must be at least 2, got {self.parts!r}")
        if self.generated not in range(self.parts):
            raise ValueError(f"Concatenated.generated must be one of 0…{self.parts - 1}, got {self.generated!r}")

    def part(self, grid: Grid, where: str) -> Grid:
        """Return the grid of one part of ``grid``, of ``where``. Raises ValueError when it does not divide."""
        along = ("height", "width").index(self.axis)
        if grid[along] % self.parts:
            raise ValueError(
                f"{where}: {self.axis} {grid[along]} does not divide into {self.parts} parts; choose latents that do "
                "at every level, or leave the layer out with layers="
            )
        h, w = grid
        return (h // self.parts, w) if along == 0 else (h, w // self.parts)

    def tokens(self, grid: Grid, part: int) -> Tensor:
        """Return indices of one part's tokens among the row-major tokens of ``grid``."""
        index = np.arange(grid[0] * grid[1]).reshape(grid)  # a tensor, once made: a run on shapes alone makes fake ones
        own = np.array_split(index, self.parts, axis=("height", "width").index(self.axis))[part]
        return torch.from_numpy(own.flatten())


@dataclass(frozen=True)
class Banked:
    """ReferenceNet-style self-attention: keys are the layer's own tokens, then a reference network's on the same grid.

    What IDM-VTON, OOTDiffusion and reference-only do: keys ``[own ‖ bank 0 ‖ bank 1 …]``. Queries are the own tokens,
    or all of them (then the first ones count). A call without banked keys (writing the bank) is passed by. Under
    guidance in the batch, the half whose bank is all zeros is the unconditional one; where neither is, say
    ``guidance=0`` (OOTDiffusion's order: [garment, zeros]) or ``guidance=1``.
    """


def choose_layers(names: Iterable[str], layers: LayerFilter) -> list[str]:
    """Return the names that a filter selects, in their order.

    Args:
        names: layer names.
        layers: None (all), a name, a glob pattern ("up_blocks.3.*"), several of them, or a predicate on the name.

    Raises:
        ValueError: a pattern, or the predicate, that selects nothing; lists what there is.
    """
    names = list(names)
    if layers is None:
        return names
    if callable(layers):
        chosen = [name for name in names if layers(name)]
        missing = [] if chosen else ["the predicate"]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        chosen = [name for name in names if any(_fits(name, p) for p in patterns)]
        missing = [repr(p) for p in patterns if not any(_fits(name, p) for name in names)]
        if not patterns:
            missing = ["an empty list"]
    if missing:
        raise ValueError(f"layers: {', '.join(missing)} selects no layer; there are: {', '.join(names) or 'none'}")
    return chosen


def _fits(name: str, pattern: str) -> bool:
    """Return whether a layer is meant: by its very name, which may hold brackets, or by a glob pattern."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
