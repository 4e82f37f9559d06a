"""Diffusion transformers with in-context references: text, generated and reference tokens share one attention.

``[text ‖ generated ‖ reference 1 ‖ …]`` is Flux Kontext's order; a family says where its own parts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from i2am.families import Family, ForwardInputs, Request, TokenLayout
from i2am.families.arguments import named_arguments
from i2am.families.keysets import key_sets
from i2am.families.registry import described_tokens
from i2am.families.tokens import among, reference_names
from i2am.ops.tokens import TokenSet
from i2am.references import SELF, Grid, Reference
from i2am.tracing.intercept import LayerContext

NO_REFERENCE = (
    "this call of the {model} has no reference image among its tokens, so no attention keys encode a reference: pass "
    "the pipeline its reference image"
)


class Segment(NamedTuple):
    """Consecutive image tokens that make one picture, row by row."""

    start: int
    grid: Grid
    order: tuple[int, ...] | None = None  # of the tokens by rows, counted from ``start``; None: as they come

    @property
    def stop(self) -> int:
        return self.start + self.grid[0] * self.grid[1]

    def tokens(self, offset: int) -> slice | list[int]:
        """Return its tokens, row by row, in an attention where image tokens begin at ``offset``."""
        first = offset + self.start
        return slice(first, offset + self.stop) if self.order is None else [first + i for i in self.order]


class JointTransformer(Family):
    """Base of transformers with one attention over all tokens: one reference-carrying call a layer.

    A subclass reads, from one forward's arguments, which tokens are what (:meth:`layout`).

    Args:
        transformer: the model.
        references: keys among the *text* tokens that encode a reference (Redux): ``tokens`` count from the first text
            token. None: references are in context only.
        self_attention: the keys asked for are the generated tokens themselves.
    """

    conditional_call: ClassVar[int | None] = 0  # guidance runs as two calls, the conditional one first
    batched_guidance: ClassVar[bool] = False
    latent_pixels: ClassVar[int] = 2
    timestep_scale: ClassVar[float] = 1000.0  # the model is given t / 1000
    attentions: ClassVar[tuple[str, ...]] = ()  # class names of the attention modules
    sets: ClassVar[tuple[str, ...]] = ("words", "text", "itself")  # of keys that can be told apart, see known_sets
    shards: ClassVar[bool] = False  # context parallelism splits [text ‖ image] in two parts, as diffusers plans it

    def __init__(
        self, transformer: nn.Module, references: Sequence[Reference] | None = None, *, self_attention: bool = False
    ):
        self.transformer = transformer
        self.self_attention = self_attention
        self.references = tuple(references or ())
        self.carried: TokenLayout | None = None  # by every layer of the running forward

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        references = described_tokens(model, request)
        if request.rollout:
            name = type(model).__name__
            raise ValueError(f"rollout=True needs an adapter with a resampler, and i2am knows none of {name}")
        return cls(model, references, self_attention=request.self_attention)

    def layers(self) -> dict[str, nn.Module]:
        found = {n: m for n, m in self.transformer.named_modules() if type(m).__name__ in self.attentions}
        return {name: m for name, m in found.items() if hasattr(m, "processor")}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        given = named_arguments(self.transformer, args, kwargs)
        self.carried = self.layout(given)
        conditioning = given.get("encoder_hidden_states")
        return ForwardInputs(
            given["hidden_states"],
            given["timestep"] * self.timestep_scale,
            self.carried.grid,
            conditioning=(conditioning,) if isinstance(conditioning, Tensor) else (),
            stepped=False,
        )

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.awaits = self.carried

    def known_sets(self) -> tuple[str, ...]:
        return self.sets

    def has_adapters(self) -> bool:
        return len(getattr(getattr(self.transformer, "encoder_hid_proj", None), "image_projection_layers", ())) > 0

    def layout(self, given: dict[str, Any]) -> TokenLayout:
        """Return what the layers of one forward carry.

        Args:
            given: the forward's arguments by name.

        Raises:
            ValueError: no reference is among the tokens, or the description of it does not fit.
        """
        raise NotImplementedError

    def in_context(
        self, generated: Segment, references: Sequence[Segment], offset: int, text: slice, keys: int | None = None
    ) -> TokenLayout:
        """Return the layout of references among the image tokens, which begin at token ``offset``, and those described
        among the text's; ``keys``: of the whole attention.
        """
        queries = slice(offset + generated.start, offset + generated.stop)
        shards = None if not self.shards or keys is None else (text.stop, keys - text.stop)
        if self.self_attention:
            itself = Reference(generated.grid, queries, name=SELF)
            return TokenLayout(generated.grid, (itself,), queries, keys=keys, parts=shards)
        parts = [
            Reference(grid=s.grid, tokens=s.tokens(offset), name=name)
            for s, name in zip(references, reference_names(len(references)), strict=True)
        ]
        parts += [among(text, r) for r in self.references]
        described = {i for r in parts for i in _positions(r, keys or text.stop)} if self.references else set()
        words = [i for i in range(text.start, text.stop) if i not in described]
        sets = key_sets(self.key_sets, words, queries, generated.grid)
        if not parts and not sets:
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        return TokenLayout(generated.grid, tuple(parts), queries, keys=keys, sets=sets, parts=shards)


def _positions(reference: Reference, length: int) -> list[int]:
    """Return a reference's keys by number."""
    return torch.arange(length)[TokenSet.of(reference.tokens, length, "tokens").index].tolist()


def apart(pictures: Sequence[tuple[float, Segment]]) -> tuple[Segment, list[Segment]]:
    """Return the generated picture, whose number is the smallest, and the references in the order of their tokens.

    Raises:
        ValueError: several pictures have that number, or one that is not row by row.
    """
    first = min(range(len(pictures)), key=lambda i: pictures[i][0])
    number = pictures[first][0]
    if pictures[first][1].order is not None or sum(n == number for n, _ in pictures) > 1:
        raise ValueError(
            f"picture {number:g} of the position ids, the generated one, does not go through its grid row by row: "
            "references need numbers other than its own, on the first axis"
        )
    segments = [segment for _, segment in pictures]
    return segments.pop(first), segments


class Positions:
    """Pictures among image tokens, from their position ids ``[N, axes]``: axis 0 says which, 1 the row, 2 the column.

    Reading them makes a GPU wait, so the last answer is kept for as long as the very same tensor comes.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, list[tuple[float, Segment]]] | None = None

    def segments(self, ids: Tensor) -> list[tuple[float, Segment]]:
        """Return ``(axis 0, segment)`` of each picture, in the order of the tokens.

        Raises:
            ValueError: the tokens of a picture do not fill a grid row by row.
        """
        if self._last is None or self._last[0] is not ids:
            self._last = ids, _segments(ids[0] if ids.ndim == 3 else ids)
        return self._last[1]


def _segments(ids: Tensor) -> list[tuple[float, Segment]]:
    which, counts = ids[:, 0].unique_consecutive(return_counts=True)
    found, start = [], 0
    for picture, count in zip(which.tolist(), counts.tolist(), strict=True):
        rows, columns = (
            axis.long() for axis in ids[start : start + count, 1:3].double().T
        )  # bfloat16 can't count them
        found += [(picture, segment) for segment in _pictures(picture, rows, columns, start)]
        start += count
    return found


def _pictures(number: float, rows: Tensor, columns: Tensor, start: int) -> list[Segment]:
    """Return the pictures among tokens of one number: one that they fill together, stitched of any parts; or the parts.

    Raises:
        ValueError: the tokens neither fill a grid nor fall into parts that do.
    """
    rows, columns = rows - rows.min(), columns - columns.min()
    grid = int(rows.max()) + 1, int(columns.max()) + 1
    place = rows * grid[1] + columns
    if len(place) == grid[0] * grid[1] == len(place.unique()):
        order = place.argsort().tolist()  # parts beside each other come one after the other, as those below do
        return [Segment(start, grid, None if order == list(range(len(order))) else tuple(order))]
    if len(place.unique()) == len(place):
        parts = _parts(rows.tolist(), columns.tolist())
        if all(h > 1 and w > 1 for _, (h, w) in parts):
            return [Segment(start + first, part) for first, part in parts]
    raise ValueError(
        f"picture {number:g} of the position ids has {len(place)} tokens, which neither fill {grid} nor fall into "
        "pictures that go row by row: several need a number each, on the first axis, or places of their own"
    )


def _parts(rows: list[int], columns: list[int]) -> list[tuple[int, Grid]]:
    """Return (first token, grid) of the rectangles that tokens go through one after the other, row by row."""
    lines: list[list[int]] = []  # first token, row, column, width
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        if lines and (row, column) == (lines[-1][1], lines[-1][2] + lines[-1][3]):
            lines[-1][3] += 1
        else:
            lines.append([i, row, column, 1])
    found: list[tuple[int, Grid]] = []
    before: list[int] = []
    for first, row, column, width in lines:
        if found and before == [row - 1, column, width]:
            start, (height, _) = found[-1]
            found[-1] = start, (height + 1, width)
        else:
            found.append((first, (1, width)))
        before = [row, column, width]
    return found
