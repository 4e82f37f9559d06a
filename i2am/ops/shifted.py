"""The streaming path for masks, few keys and any logits: rows are relative to their maximum.

A tile holds every key of a few queries, so that its rows' normalisers are known as soon as it is computed. The column
sums are gathered from the same exponentials. A masked pair is -inf, whatever q and k hold there; an overflow to -inf is
NaN, so that it is not taken for masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops.heads import LOG2E, Heads, Reference, both, evenly, product, sum_of, within

TILE = 5 << 18  # elements: 5 MiB of float32, small enough for the caches, large enough to hide the calls' overhead
NARROW = 48  # with fewer keys a tile lies transposed in memory, so that its long axis is the contiguous one
WEAK = 2.0**-80  # a column sum below this share of the strongest row may have lost terms that count to underflow
TINY = 1e-30  # below any row sum: its largest term is 1
SMALL = 1 << 16  # elements of q and k: up to here looking for overflows costs more than being prepared for them


class Part(NamedTuple):
    """Results of the first sweep over some queries."""

    top: Tensor  # [G, 1] the largest shift
    sums: Tensor  # [G, hull] column sums relative to it
    spent: list[Tensor]  # one [G, 1 + regions, K] per reference


class Kept(NamedTuple):
    """The exponentials of all generated queries, where one tile holds them, and the weights that undo their shifts."""

    e: Tensor  # [G, Q, Nk]
    undo: Tensor  # [G, Q]


class Shifted:
    """Both sweeps over ``G`` heads; ``s`` is a tile of logits, ``e`` one of exponentials, both ``[G, R, Nk]``.

    Logits are in units of ``unit``: LOG2E (so that exponentials are powers of 2), or 1 with an additive mask, whose
    lowest finite number would overflow.
    """

    def __init__(self, heads: Heads):
        self._heads = heads
        self._overflows = heads.q.numel() + heads.k.numel() <= SMALL or heads.may_overflow()
        self._unit = LOG2E if heads.bias is None or heads.bias.dtype == torch.bool else 1.0
        self._k = (heads.k.to(heads.dtype) * (heads.scale * self._unit)).contiguous().transpose(1, 2)  # [G, d, Nk]
        self._v = None if heads.v is None else heads.v.to(heads.dtype)  # [G, Nk, dv]
        self._broken: Tensor | None = None  # [G, Nk, dv] 1 where a value is not finite
        if self._v is not None and heads.masks_broken_values():
            broken = ~self._v.isfinite()
            self._broken, self._v = broken.to(heads.dtype), self._v.masked_fill(broken, 0.0)
        self._kept: Kept | None = None
        self._spent: list[Tensor] = []
        self._sums = self._lse = self._k.new_empty(0)  # [G, hull], once known

    # ------------------------------------------------------------------------------------------------- first sweep

    def first(self, rows: slice) -> Part:
        """Write ``out`` and ``row_lse`` of some queries and add their mass; return what the other sums need."""
        heads, G = self._heads, len(self._k)
        hull = heads.hull.stop - heads.hull.start
        part = Part(
            self._k.new_full((G, 1), -math.inf),
            self._k.new_zeros(G, hull),
            [self._k.new_zeros(G, len(heads.weights), r.size) for r in heads.references],
        )
        for tile in self._tiles(rows, heads.k.shape[1]):
            part = self._first(tile, part)
        return part

    def _first(self, rows: slice, part: Part) -> Part:
        heads = self._heads
        s = self._logits(rows, slice(0, heads.k.shape[1]))
        top = s.amax(2)  # [G, R]
        if heads.bias is None and self._overflows:
            top.masked_fill_(top.isneginf(), math.nan)  # nothing is masked, so it is an overflow
        shift = top if heads.bias is None else _finite(top)
        e = self._exp_(s.sub_(shift.unsqueeze(2)))
        sums = e.sum(2)  # [G, R]
        heads.row_lse[:, rows] = (self._log(sums) + shift) / self._unit
        inverse = sums.clamp_min_(TINY).reciprocal_()  # a fully masked row, all zeros, stays so
        self._write(rows, e, inverse)
        generated = both(rows, heads.queries)
        if generated.start == generated.stop:
            return part
        here, there = within(generated, rows), within(generated, heads.queries)
        e, inverse, shift = e[:, here], inverse[:, here], shift[:, here]
        top = torch.maximum(part.top, shift.amax(1, keepdim=True))
        undo = self._exp_(shift - top)  # [G, R]
        part.sums.mul_(self._exp_(part.top - top)).add_(_rows_times(undo, e[:, :, heads.hull]))
        for reference, spent in zip(heads.references, part.spent, strict=True):
            spent.baddbmm_(heads.weights[:, there] * inverse.unsqueeze(1), e[:, :, reference.keys])
            if reference.mass is not None:
                reference.mass[:, there].add_(e[:, :, reference.keys].sum(2).mul_(inverse))
        if rows == slice(0, heads.q.shape[1]):
            self._kept = Kept(e, undo)
        return part._replace(top=top)

    def _write(self, rows: slice, e: Tensor, inverse: Tensor) -> None:
        """Write ``out = inverse · e v``; NaN where a value that takes part is not finite."""
        out = self._heads.out
        if out is None or self._v is None:
            return
        found = product(e, self._v).mul_(inverse.unsqueeze(2))
        if self._broken is not None:
            allowed = self._heads.allowed(rows, slice(0, e.shape[2])).to(found)
            found.masked_fill_(torch.bmm(allowed.expand(e.shape), self._broken) > 0, math.nan)
        out[:, rows] = found

    # ------------------------------------------------------------------------------------------------- column sums

    def columns(self, parts: Sequence[Part]) -> Tensor:
        """Merge what the queries left; return the columns' log-sum-exp ``[G, hull]``.

        Columns far below the strongest row are computed anew: their terms underflowed. So are fully masked ones (-inf).
        """
        top, self._sums = parts[0].top, parts[0].sums
        if len(parts) > 1:
            top = torch.stack([part.top for part in parts]).amax(0)
            self._sums = sum_of([part.sums * self._exp_(part.top - top) for part in parts])
        self._spent = [sum_of(spent) for spent in zip(*(part.spent for part in parts), strict=True)]
        self._lse = self._log(self._sums) + top
        strong = self._sums >= WEAK  # NaN is not
        if not bool(strong.all()):
            weak = (~strong).any(0).nonzero().squeeze(1)  # [W]
            self._lse[:, weak] = self._exact(weak)
            self._kept = None
        return self._lse / self._unit

    def _exact(self, columns: Tensor) -> Tensor:
        """Return the log-sum-exp of some columns of the hull, ``[G, W]``, by their own maxima."""
        exact = self._k.new_full((len(self._k), len(columns)), -math.inf)
        for rows in self._tiles(self._heads.queries, len(columns)):
            s = self._logits(rows, columns + self._heads.hull.start)  # [G, R, W]
            if self._heads.bias is None and self._overflows:
                s.masked_fill_(s.isneginf(), math.nan)
            exact = torch.logaddexp(exact, torch.logsumexp(s / self._unit, 1))
        return exact * self._unit

    # ------------------------------------------------------------------------------------------------ second sweep

    def second(self, rows: slice) -> None:
        """Add R2G of some generated queries: their share of each column."""
        for reference in self._heads.references:
            if self._kept is not None:
                self._look(self._kept, reference)
            else:
                self._second(rows, reference)

    def _second(self, rows: slice, reference: Reference) -> None:
        lse = _finite(self._lse[:, within(reference.keys, self._heads.hull)]).unsqueeze(1)  # [G, 1, K]
        for tile in self._tiles(rows, reference.size):
            c = self._exp_(self._logits(tile, reference.keys).sub_(lse))  # [G, R, K] column probabilities
            reference.r2g[:, within(tile, self._heads.queries)].add_(c.sum(2), alpha=1.0 / reference.size)
            del c  # before the next tile is allocated, which then takes its place in the caches

    def _look(self, kept: Kept, reference: Reference) -> None:
        """Do what :meth:`_second` does, from the exponentials at hand."""
        sums = self._sums[:, within(reference.keys, self._heads.hull)]  # [G, K]
        shares = _rows_times(sums.reciprocal(), kept.e[:, :, reference.keys].transpose(1, 2))  # [G, Q]
        reference.r2g.add_(shares.mul_(kept.undo), alpha=1.0 / reference.size)

    def finish(self, parts: Sequence[None]) -> None:
        """Add G2R and SRAM of all queries."""
        for reference, spent in zip(self._heads.references, self._spent, strict=True):
            reference.add(spent)

    # ------------------------------------------------------------------------------------------------------- tiles

    def _tiles(self, rows: slice, width: int) -> Iterator[slice]:
        """Yield ``rows`` in tiles of at most TILE for ``width`` keys, 4 TILE for their q or out."""
        G, d, _ = self._k.shape
        longest = d if self._v is None else max(d, self._v.shape[2])
        return evenly(rows, max(1, TILE // (G * max(width, longest // 4))))

    def _logits(self, rows: slice, keys: slice | Tensor) -> Tensor:
        q, k = self._heads.q[:, rows].to(self._heads.dtype), self._k[:, :, keys]  # [G, R, d], [G, d, K]
        narrow = k.shape[2] < NARROW
        s = product(k.transpose(1, 2), q.transpose(1, 2)).transpose(1, 2) if narrow else product(q, k)
        bias = None if self._heads.bias is None else self._heads.part_of_bias(rows, keys)
        if bias is not None and bias.dtype != torch.bool:
            s.add_(bias)
        if bias is not None and self._overflows:
            s.masked_fill_(s.isneginf(), math.nan)
        if bias is not None and (self._overflows or bias.dtype == torch.bool):
            s.masked_fill_(~self._heads.allowed(rows, keys), -math.inf)
        return s

    def _exp_(self, s: Tensor) -> Tensor:
        return (s if self._unit == LOG2E else s.mul_(LOG2E)).exp2_()

    def _log(self, x: Tensor) -> Tensor:
        return x.log().mul_(self._unit)


def _rows_times(weights: Tensor, e: Tensor) -> Tensor:
    """Return ``Σ_i weights[i] · e[i, :]``: ``[G, R]`` and ``[G, R, K]`` give ``[G, K]``."""
    return torch.bmm(weights.unsqueeze(1), e).squeeze(1)


def _finite(x: Tensor) -> Tensor:
    """Return what to subtract: nothing where everything is masked (-inf)."""
    return x.masked_fill(x.isneginf(), 0.0)
