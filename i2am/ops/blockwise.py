"""The streaming path without a mask: tiles of some queries × some keys, that a core's own cache holds.

A row's exponentials are taken relative to its largest logit among a few keys (its *shift*), which is known before the
row is. Any shift does whose exponentials stay in range, and the row sums tell whether they did: where not, the caller
takes :mod:`i2am.ops.shifted`. The shift is one more column of q and k, so that subtracting it costs nothing:

    e_ij = 2^(s_ij − shift_i) = exp2([q, −shift] [k, 1]ᵀ)

Everything else is a product with ``e``: output, row sums and mass ``e [V, 1, 1_𝒦]``; column sums ``uᵀ e`` with
``u = 2^(shift − top + LIFT)``; then R2G ``u ∘ e (1 / columns)``, G2R and SRAM ``(w / rows)ᵀ e``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops.heads import LARGE, LOG2E, Heads, both, evenly, largest, product, sum_of, within

KEYS = 1024  # of a tile
TILE = 1 << 18  # elements of a tile: 1 MiB of float32
LANES = 16  # float32 of a vector register: products are faster when their width is a multiple
SAMPLE = 16  # keys that a row's shift is the largest logit of
LIFT = 24.0  # log2, by which the strongest row's column weight lies above 1: those of weak rows underflow later
LIMIT = 2.0**64  # of a row sum; below it no row that a column above WEAK needs has underflowed
ROOM = 2.0**126  # of a row sum times the largest value
WEAK = 2.0 ** (LIFT - 40)  # a column sum below this, 2^-40 of the strongest row's weight, is computed anew
LN2 = math.log(2.0)


class Part(NamedTuple):
    """Results of the first sweep over some queries."""

    good: bool  # whether all exponentials stayed in range
    top: Tensor  # [G, 1] the largest logit of the samples
    sums: Tensor  # [G, 1, hull] column sums relative to it


class Blockwise:
    """Both sweeps over ``G`` heads; ``e`` are tiles of exponentials ``[G, R, K]``."""

    def __init__(self, heads: Heads, keep: int):
        """Prepare q, k and v; up to ``keep`` exponentials of a piece are kept for the second sweep."""
        self._heads, self._keep = heads, keep
        (G, Nq, d), Nk = heads.q.shape, heads.k.shape[1]
        self._q = heads.weights.new_empty(G, Nq, d + 1)  # [q, −shift], of which a piece fills its rows
        self._k = heads.weights.new_ones(G, Nk, d + 1)  # [k, 1]
        self._k[:, :, :d] = heads.k
        self._k[:, :, :d] *= heads.scale * LOG2E
        self._reach = largest(self._k) * d
        self._limit = LIMIT if heads.v is None else min(LIMIT, ROOM / max(largest(heads.v), 1.0))
        self._values = _values(heads)  # [G, Nk, width] each
        self._rows = heads.weights.new_empty(G, Nq)  # their sums' reciprocals
        n, Q = len(heads.references), heads.queries.stop - heads.queries.start
        self._mass = heads.weights.new_empty(n if heads.keeps_mass else 0, G, Q)
        self._kept: dict[tuple[int, int], Tensor] = {}  # by a tile's first query and key
        self._top = self._columns = self._lse = heads.weights.new_empty(0)  # [G, 1], [G, hull], [G, hull]
        self._weak: Tensor | None = None  # [W] columns of the hull that were computed anew

    # ------------------------------------------------------------------------------------------------- first sweep

    def first(self, rows: slice) -> Part:
        """Write ``out`` and ``row_lse`` of some queries; return what their columns need."""
        heads = self._heads
        shift = self._take_up(rows)  # [G, rows]
        good, left = largest(self._q[:, rows]) * self._reach < LARGE, self._keep
        generated = both(rows, heads.queries)
        top = shift.new_full((len(shift), 1), -math.inf)
        if generated.start < generated.stop:
            top = shift[:, within(generated, rows)].amax(1, keepdim=True)
        undo = _lifted(shift.sub_(top)).unsqueeze(1)  # [G, 1, rows]
        sums = shift.new_zeros(len(shift), 1, heads.hull.stop - heads.hull.start)
        scratch = self._scratch()
        for tile in self._row_tiles(rows):
            totals: list[Tensor | None] = [None for _ in self._values]  # [G, R, width] each
            counts = both(tile, heads.queries) == tile
            for keys in self._key_tiles():
                size = len(shift) * (tile.stop - tile.start) * (keys.stop - keys.start)
                keeps = counts and heads.hull.start <= keys.start < heads.hull.stop and size <= left
                e = self._exponentials(tile, keys, None if keeps else scratch)
                if keeps:
                    self._kept[tile.start, keys.start], left = e, left - size
                totals = [_plus(x, e, values[:, keys]) for x, values in zip(totals, self._values, strict=True)]
                there = both(keys, heads.hull)
                if counts and there.start < there.stop:
                    sums[:, :, within(there, heads.hull)].baddbmm_(undo[:, :, within(tile, rows)], e)
            good = self._write(tile, [x for x in totals if x is not None]) and good
        return Part(good, top, sums)

    def _take_up(self, rows: slice) -> Tensor:
        """Fill in these rows' q and shift; return a copy of the shift, ``[G, rows]``."""
        q, d = self._q[:, rows], self._heads.q.shape[2]
        q[:, :, :d] = self._heads.q[:, rows]
        step = max(1, self._k.shape[1] // SAMPLE)
        few = self._k[:, step // 2 :: step, :d].transpose(1, 2)  # [G, d, sample]
        for tile in evenly(slice(0, rows.stop - rows.start), max(1, TILE // (len(q) * few.shape[2]))):
            q[:, tile, d] = -torch.bmm(q[:, tile, :d], few).amax(2)
        return q[:, :, d].neg()

    def _write(self, rows: slice, totals: list[Tensor]) -> bool:
        """Write the rows' output and log-sum-exp; return whether their exponentials were in range."""
        heads = self._heads
        width = 0 if heads.v is None else heads.v.shape[2]
        ones = totals[0][:, :, width:] if len(totals) == 1 else torch.cat(totals[-1 - len(self._mass) :], 2)
        sums = ones[:, :, 0]  # [G, R]
        heads.row_lse[:, rows] = (sums.log2() - self._q[:, rows, -1]).mul_(LN2)
        self._rows[:, rows] = inverse = sums.reciprocal()
        if heads.out is not None:
            mean, factor = totals[0][:, :, :width], inverse.unsqueeze(2)
            if heads.out.dtype == mean.dtype:
                torch.mul(mean, factor, out=heads.out[:, rows])
            else:
                heads.out[:, rows] = mean.mul_(factor)
        if heads.keeps_mass and both(rows, heads.queries) == rows:
            mass = ones[:, :, 1 : 1 + len(self._mass)] * self._rows[:, rows].unsqueeze(2)  # [G, R, n]
            self._mass[:, :, within(rows, heads.queries)] = mass.permute(2, 0, 1)
        return bool((sums < self._limit).all())  # not so where they are NaN

    # ------------------------------------------------------------------------------------------------- column sums

    def columns(self, parts: Sequence[Part]) -> Tensor | None:
        """Merge what the queries left; return the columns' log-sum-exp ``[G, hull]``, None if some were out of range.

        Columns far below the strongest row are computed anew: their terms may have underflowed.
        """
        if not all(part.good for part in parts):
            return None
        self._top = torch.stack([part.top for part in parts]).amax(0)
        sums = sum_of([part.sums[:, 0] * (part.top - self._top).exp2_() for part in parts])
        self._lse = (sums * 2.0**-LIFT).log2_().add_(self._top)
        self._columns = sums.reciprocal()
        strong = sums >= WEAK
        if not bool(strong.all()):
            self._weak = weak = (~strong).any(0).nonzero().squeeze(1)
            self._lse[:, weak] = self._exact(weak)
            self._columns[:, weak] = 0.0  # their share of R2G is added apart
        return self._lse * LN2

    def _exact(self, columns: Tensor) -> Tensor:
        """Return the log2-sum-exp2 of some columns of the hull, ``[G, W]``, by their own maxima."""
        exact = self._k.new_full((len(self._k), len(columns)), -math.inf)
        for rows in self._tiles_of(self._heads.queries, len(columns)):
            s = self._logits(rows, columns)
            top = s.amax(1)  # [G, W]
            exact = torch.logaddexp2(exact, s.sub_(top.unsqueeze(1)).exp2_().sum(1).log2_().add_(top))
        return exact

    def _logits(self, rows: slice, columns: Tensor) -> Tensor:
        """Return logits of some columns of the hull, ``[G, R, W]``, log2."""
        d = self._heads.q.shape[2]
        return torch.bmm(self._q[:, rows, :d], self._k[:, columns + self._heads.hull.start, :d].transpose(1, 2))

    # ------------------------------------------------------------------------------------------------ second sweep

    def second(self, rows: slice) -> Tensor:
        """Add R2G and mass of some generated queries; return ``[G, 1 + regions, hull]``: their G2R and SRAM."""
        heads = self._heads
        spent = self._rows.new_zeros(len(self._rows), len(heads.weights), heads.hull.stop - heads.hull.start)
        scratch = self._scratch()
        for tile in self._row_tiles(rows):
            there = within(tile, heads.queries)
            weights = heads.weights[:, there] * self._rows[:, tile].unsqueeze(1)  # [G, 1 + regions, R]
            undo = _lifted(-self._q[:, tile, -1] - self._top)  # [G, R]
            shares: list[Tensor | None] = [None for _ in heads.references]  # [G, R, 1]
            for keys in self._key_tiles(heads.hull):
                e = self._kept.pop((tile.start, keys.start), None)
                e = self._exponentials(tile, keys, scratch) if e is None else e
                spent[:, :, within(keys, heads.hull)].baddbmm_(weights, e)
                for n, reference in enumerate(heads.references):
                    part = both(keys, reference.keys)
                    if part.start < part.stop:
                        columns = self._columns[:, within(part, heads.hull)].unsqueeze(2)  # [G, K, 1]
                        shares[n] = _plus(shares[n], e[:, :, within(part, keys)], columns)
            for n, (reference, share) in enumerate(zip(heads.references, shares, strict=True)):
                assert share is not None  # a reference has keys
                reference.r2g[:, there].add_(share[:, :, 0].mul_(undo).mul_(1.0 / reference.size))
                if reference.mass is not None:
                    reference.mass[:, there].add_(self._mass[n][:, there])
        if self._weak is not None:
            self._add_weak(rows, self._weak)
        return spent

    def _add_weak(self, rows: slice, columns: Tensor) -> None:
        """Add R2G's share of the columns that were computed anew."""
        heads = self._heads
        lse = self._lse[:, columns].unsqueeze(1)  # [G, 1, W]
        at = columns + heads.hull.start
        inside = [((at >= r.keys.start) & (at < r.keys.stop)).to(lse) / r.size for r in heads.references]  # [W]
        for tile in self._tiles_of(rows, len(columns)):
            c = self._logits(tile, columns).sub_(lse).exp2_()  # [G, R, W] column probabilities
            for reference, share in zip(heads.references, inside, strict=True):
                reference.r2g[:, within(tile, heads.queries)].add_(c @ share)

    def finish(self, parts: Sequence[Tensor]) -> None:
        """Add G2R and SRAM of all queries."""
        spent = sum_of(parts)
        for reference in self._heads.references:
            reference.add(spent[:, :, within(reference.keys, self._heads.hull)])

    # ------------------------------------------------------------------------------------------------------- tiles

    def _row_tiles(self, rows: slice) -> Iterator[slice]:
        """Yield ``rows`` in tiles of which none holds both queries that are generated and others."""
        generated = both(rows, self._heads.queries)
        most = max(1, TILE // (len(self._k) * max(min(self._k.shape[1], KEYS), self._k.shape[2])))  # whatever v is
        before = slice(rows.start, min(rows.stop, generated.start))
        for span in (before, generated, slice(max(before.stop, generated.stop), rows.stop)):
            yield from evenly(span, most)

    def _key_tiles(self, span: slice | None = None) -> Iterator[slice]:
        """Yield the keys in tiles of which none holds both keys of the hull and others; those of a span of both."""
        hull = self._heads.hull
        for part in (slice(0, hull.start), hull, slice(hull.stop, self._k.shape[1])):
            if span is None or span == part:
                yield from evenly(part, KEYS)

    def _tiles_of(self, rows: slice, width: int) -> Iterator[slice]:
        return evenly(rows, max(1, TILE // (len(self._k) * width)))

    def _scratch(self) -> Tensor:
        """Return room for one tile."""
        return self._k.new_empty(max(TILE, len(self._k) * min(self._k.shape[1], KEYS)))

    def _exponentials(self, rows: slice, keys: slice, scratch: Tensor | None) -> Tensor:
        """Return the exponentials of a tile, ``[G, R, K]``; in ``scratch``, where it is given."""
        shape = len(self._k), rows.stop - rows.start, keys.stop - keys.start
        room = self._k.new_empty(shape) if scratch is None else scratch[: math.prod(shape)].view(shape)
        return product(self._q[:, rows], self._k[:, keys].transpose(1, 2), room).exp2_()


def _lifted(x: Tensor) -> Tensor:
    """Return ``2^(x + LIFT)``, in place; x is not rounded to the digits that ``x + LIFT`` has."""
    root = x.mul_(0.5).exp2_()
    return root.mul(2.0**LIFT).mul_(root)


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a b``, in place; ``a b`` of ``[G, M, d]`` and ``[G, d, N]`` where there is no total yet."""
    return product(a, b) if total is None else total.baddbmm_(a, b)


def _values(heads: Heads) -> list[Tensor]:
    """Return what exponentials are multiplied by, ``V``, ones and each reference's membership.

    Returns: ``[V, 1, 1_𝒦 …, 0 …]``, ``[G, Nk, width]`` of a multiple of LANES, where that costs no more than V alone;
    else V, filled up likewise, and the others, ``[G, Nk, 1]`` each, whose products are cheap.
    """
    G, Nk, _ = heads.k.shape
    ones = [heads.weights.new_ones(G, Nk, 1)]
    for reference in heads.references if heads.keeps_mass else ():
        ones.append(torch.zeros_like(ones[0]))
        ones[-1][:, reference.keys] = 1.0
    if heads.v is None:
        return ones
    dv = heads.v.shape[2]
    values = heads.weights.new_zeros(G, Nk, dv + -dv % LANES)
    values[:, :, :dv] = heads.v
    if dv + len(ones) > values.shape[2]:
        return [values, *ones]
    values[:, :, dv : dv + len(ones)] = torch.cat(ones, 2)
    return [values]
