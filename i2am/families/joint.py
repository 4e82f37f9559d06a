"""Diffusion transformers with in-context references: text, generated and reference tokens share one attention.

``[text ‖ generated ‖ reference 1 ‖ …]`` is Flux Kontext's order; a family says where its own parts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from i2am.families import Forward
from i2am.families.arguments import named_arguments
from i2am.references import SELF, Carried, Grid, Reference
from i2am.tracing.intercept import RunningLayer

NO_REFERENCE = (
    "this call of the {model} has no reference image among its tokens, so no attention keys encode a reference: pass "
    "the pipeline its reference image"
)


class Segment(NamedTuple):
    """Consecutive image tokens that make one picture, row by row."""

    start: int
    grid: Grid

    @property
    def stop(self) -> int:
        return self.start + self.grid[0] * self.grid[1]


class JointTransformer:
    """What transformers with one attention over all tokens share: one reference-carrying call a layer.

    A subclass reads, from one forward's arguments, which tokens are what (:meth:`layout`).

    Args:
        transformer: the model.
        references: keys among the *text* tokens that encode a reference (Redux): ``tokens`` count from the first text
            token. None: references are in context only.
        itself: the keys asked for are the generated tokens themselves.
    """

    conditional_call: int | None = 0  # guidance runs as two calls, the conditional one first
    timestep_scale = 1000.0  # the model is given t / 1000
    batched_guidance = False
    latent_pixels = 2
    attentions: tuple[str, ...] = ()  # class names of the attention modules

    def __init__(self, transformer: nn.Module, references: Sequence[Reference] | None = None, *, itself: bool = False):
        self.transformer = transformer
        self.itself = itself
        self.references = tuple(references or ())
        self.carried: Carried | None = None  # by every layer of the running forward

    def layers(self) -> dict[str, nn.Module]:
        found = {n: m for n, m in self.transformer.named_modules() if type(m).__name__ in self.attentions}
        return {name: m for name, m in found.items() if hasattr(m, "processor")}

    def by_default(self, layer: str) -> bool:
        return True

    def leave(self, layer: RunningLayer, module: nn.Module) -> None:
        return None

    def watch(self) -> Iterable[RemovableHandle]:
        return ()

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Forward:
        given = named_arguments(self.transformer, args, kwargs)
        self.carried = self.layout(given)
        return Forward(given["hidden_states"], given["timestep"] * self.timestep_scale, self.carried.grid)

    def enter(self, layer: RunningLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        layer.carries = self.carried

    def has_adapters(self) -> bool:
        """Whether IP-Adapters are loaded."""
        return len(getattr(getattr(self.transformer, "encoder_hid_proj", None), "image_projection_layers", ())) > 0

    def layout(self, given: dict[str, Any]) -> Carried:
        """What the layers of one forward carry.

        Args:
            given: the forward's arguments by name.

        Raises:
            ValueError: no reference is among the tokens, or the description of it does not fit.
        """
        raise NotImplementedError

    def in_context(self, generated: Segment, references: Sequence[Segment], offset: int, text: slice) -> Carried:
        """References among the image tokens, which begin at token ``offset``, and those described among the text's."""
        queries = slice(offset + generated.start, offset + generated.stop)
        if self.itself:
            return Carried(generated.grid, (Reference(generated.grid, queries, name=SELF),), queries)
        parts = [
            Reference(grid=s.grid, tokens=slice(offset + s.start, offset + s.stop), name=name)
            for s, name in zip(references, reference_names(len(references)), strict=True)
        ]
        parts += [among(text, r) for r in self.references]
        if not parts:
            raise ValueError(NO_REFERENCE.format(model=type(self.transformer).__name__))
        return Carried(generated.grid, tuple(parts), queries)


def among(text: slice, reference: Reference) -> Reference:
    """A reference whose ``tokens`` count from the first text token, as tokens of the whole attention."""
    length = text.stop - text.start
    reference.check(length)
    tokens = reference.tokens
    if isinstance(tokens, slice):
        chosen = range(text.start, text.stop)[tokens]
        return replace(reference, tokens=slice(chosen.start, chosen.stop, chosen.step))
    tokens = torch.as_tensor(tokens)
    tokens = tokens.nonzero().squeeze(1) if tokens.dtype == torch.bool else tokens
    return replace(reference, tokens=tokens % length + text.start)


def apart(pictures: Sequence[tuple[float, Segment]]) -> tuple[Segment, list[Segment]]:
    """The generated picture, whose number is the smallest, and the references in the order of their tokens."""
    first = min(range(len(pictures)), key=lambda i: pictures[i][0])
    segments = [segment for _, segment in pictures]
    return segments.pop(first), segments


def reference_names(count: int) -> list[str]:
    return ["reference"] if count == 1 else [f"reference_{i}" for i in range(count)]


class Positions:
    """Pictures among image tokens, from their position ids ``[N, axes]``: axis 0 says which, 1 the row, 2 the column.

    Reading them makes a GPU wait, so the last answer is kept for as long as the very same tensor comes.
    """

    def __init__(self):
        self._last: tuple[Tensor, list[tuple[float, Segment]]] | None = None

    def segments(self, ids: Tensor) -> list[tuple[float, Segment]]:
        """``(axis 0, segment)`` of each picture, in the order of the tokens.

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
        rows, columns = ids[start : start + count, 1:3].double().T  # bfloat16 can't count the tokens of a picture
        grid = tuple(int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
        if grid[0] * grid[1] != count:
            raise ValueError(f"picture {picture:g} of the position ids has {count} tokens, which do not fill {grid}")
        order = (rows - rows.min()) * grid[1] + (columns - columns.min())
        if not order.equal(torch.arange(count).to(order)):
            raise ValueError(
                f"picture {picture:g} of the position ids has {count} tokens, which do not go through {grid} row by "
                "row: several pictures need a number of their own each, on the first axis"
            )
        found.append((picture, Segment(start, grid)))
        start += count
    return found
