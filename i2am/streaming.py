"""The streaming path: attention and attribution in torch ops, in tiles, never an ``Nq × Nk`` tensor.

What a machine without the Triton kernels runs; any device, float16 to float64 in, float32 statistics (float64 for
float64 inputs). A tile holds every key of a few queries, so a row's normaliser is known as soon as its tile is:

1. first sweep: ``out``, row log-sum-exp, G2R, mass and SRAM are final; the column sums are gathered,
2. second sweep, over the reference columns only: the logits once more, against the finished column sums, give R2G.
   Heads that fit one tile skip it: their tile is still there.

There are two ways to take the exponential. :class:`_Unshifted` is the cheap one and can tell afterwards whether all its
sums stayed in range; :class:`_Shifted` is right for any logits. In both, ``s`` is a tile of logits and ``e`` one of
exponentials, ``[G, R, Nk]``: ``G`` heads, ``R`` queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 5 << 18  # elements: 5 MiB of float32, small enough for the caches, large enough to hide the calls' overhead
SMALL = 1 << 18  # heads share a tile up to this size; beyond it one head at a time has the faster products
NARROW = 64  # with fewer keys a tile lies transposed in memory, so that its long axis is the contiguous one
LANES = 16  # float32 lanes of a vector register: the product with V is 1.5× faster when dv is a multiple
REACH = 55.0  # sums of unshifted exponentials within e^±55: what underflowed (2^-126) is below their rounding
LOG2E = math.log2(math.e)  # torch's exp2 is 4× as fast as its exp on x86

Span = tuple[int, int]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: Span,
    keys: list[Span],
    r2g: list[Tensor],
    g2r: list[Tensor],
    mass: list[Tensor],
    sram: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One attention call; adds to the running sums of every reference. See :func:`i2am.ops.accumulate`."""
    B, H, Nq, _ = q.shape
    hull = (min(a for a, _ in keys), max(b for _, b in keys))  # the columns whose statistics are kept
    out = q.new_empty(0) if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2)
    row_lse = q.new_empty(B, H, Nq, dtype=torch.float32)
    col_lse = q.new_empty(B, H, hull[1] - hull[0], dtype=torch.float32)
    exponentials = _Unshifted if mask is None else _Shifted
    for at in _groups(B, H, Nq * k.shape[2]):
        heads = _Heads.of(at, q, k, v, mask, regions, scale, queries, keys, hull)
        target = None if v is None else out[at]
        first = _first_sweep(heads, exponentials(heads), target, row_lse[at])
        if not first.columns.holds(row_lse[at]):
            exponentials = _Shifted  # for the heads to come as well: they are likely to need it too
            first = _first_sweep(heads, exponentials(heads), target, row_lse[at])
        col_lse[at] = first.columns.lse()
        for n, share in enumerate(_second_sweep(heads, first)):
            r2g[n][at].add_(share)
            g2r[n][at].add_(first.weighted[n][:, 0])
            if mass:
                mass[n][at].add_(first.mass[n])
            if regions is not None:
                sram[n][at].add_(first.weighted[n][:, 1:])
    return out, row_lse, col_lse


def _groups(B: int, H: int, elements: int) -> Iterator[tuple[int, slice]]:
    """Which heads are worked on together: ``(image, heads)``, for an attention of ``elements`` per head."""
    step = max(1, min(H, SMALL // elements))
    for b in range(B):
        for h in range(0, H, step):
            yield b, slice(h, min(h + step, H))


class _Heads(NamedTuple):
    """The inputs of ``G`` heads of one image, in the dtype of the statistics where a product needs it."""

    q: Tensor  # [G, Nq, d]
    k: Tensor  # [G, Nk, d]
    v: Tensor | None  # [G, Nk, dv], dv rounded up to LANES with zeros
    mask: Tensor | None  # [1 | G, 1 | Nq, 1 | Nk]
    scale: float
    queries: Span
    keys: list[Span]
    hull: Span
    weights: Tensor  # [1 + regions, Q] weights over the generated queries; the first row takes their mean

    @classmethod
    def of(cls, at, q, k, v, mask, regions, scale, queries, keys, hull) -> _Heads:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        Q = queries[1] - queries[0]
        weights = q.new_full((1, Q), 1.0 / Q, dtype=dtype)
        if regions is not None:
            weights = torch.cat([weights, regions[at[0] if len(regions) > 1 else 0].to(weights)])
        if v is not None:
            v = torch.nn.functional.pad(v[at].to(dtype), (0, -v.shape[-1] % LANES))
        return cls(
            q[at],
            k[at].to(dtype).contiguous(),
            v,
            None if mask is None else _unexpanded(mask[at]),
            scale,
            queries,
            keys,
            hull,
            weights,
        )

    def rows(self, first: int, last: int, width: int) -> Iterator[slice]:
        """Tiles of queries over ``[first, last)``, as many as TILE allows for ``width`` keys, of about equal size."""
        most = max(1, TILE // (self.q.shape[0] * width))
        count = -(-(last - first) // most)
        step = -(-(last - first) // count)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last))

    def generated(self, rows: slice) -> tuple[slice, slice]:
        """The generated queries among ``rows``: their places in the tile, and in ``[0, Q)``. Possibly none."""
        first, last = max(rows.start, self.queries[0]), min(rows.stop, self.queries[1])
        last = max(first, last)
        return slice(first - rows.start, last - rows.start), slice(first - self.queries[0], last - self.queries[0])

    def logits(self, rows: slice, keys: Span, unit: float) -> Tensor:
        """``unit · (scale · q kᵀ + bias)`` of a tile, ``[G, R, K]``; ``unit`` is 1 where there is a mask."""
        q = self.q[:, rows].to(self.k.dtype) * (self.scale * unit)  # [G, R, d]
        k = self.k[:, slice(*keys)]  # [G, K, d]
        s = _product(k, q).transpose(1, 2) if k.shape[1] < NARROW else _product(q, k)
        if self.mask is None:
            return s
        mask = _cut(_cut(self.mask, 1, rows), 2, slice(*keys))  # [1 | G, 1 | R, 1 | K]
        return s.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else s.add_(mask)


class _Unshifted:
    """``e = exp(s)`` as it is: no maxima, and the column sums are plain sums of ``e``.

    Right as long as every row and column sum is of moderate size (:meth:`holds`): then nothing overflowed, and what
    underflowed was too small to count. Logits of trained models pass; ±80 does not, nor does a fully masked row.
    """

    unit = LOG2E
    reusable = True  # the first sweep's e serves the second one too

    def __init__(self, heads: _Heads):
        self.hull = slice(*heads.hull)
        self.sums = heads.k.new_zeros(heads.k.shape[0], heads.hull[1] - heads.hull[0])  # [G, K]

    def rows(self, s: Tensor, generated: slice) -> tuple[Tensor, Tensor | float]:
        """Turns ``s`` into ``e`` in place and takes up the generated rows' columns. Returns ``e`` and its shift."""
        e = s.exp2_()
        self.sums += e[:, generated, self.hull].sum(1)
        return e, 0.0

    def holds(self, row_lse: Tensor) -> bool:
        return bool((row_lse.abs().amax() < REACH) & (self.lse().abs().amax() < REACH))

    def lse(self) -> Tensor:
        return self.sums.log()

    def shares(self, s: Tensor, keys: Span) -> Tensor:
        """Sum over ``keys`` of the column softmax, ``[G, R]``, from their logits ``[G, R, K]``."""
        return self.shares_of(s.exp2_(), keys)

    def shares_of(self, e: Tensor, keys: Span) -> Tensor:
        sums = self.sums[:, keys[0] - self.hull.start : keys[1] - self.hull.start]
        return torch.bmm(e, sums.reciprocal().unsqueeze(2)).squeeze(2)


class _Shifted:
    """``e = exp(s − row maximum)``, and column sums against running column maxima: right for any logits and mask."""

    unit = 1.0  # natural: a mask of finfo.min must not overflow when it changes base
    reusable = False

    def __init__(self, heads: _Heads):
        self.hull = slice(*heads.hull)
        self.sums = heads.k.new_zeros(heads.k.shape[0], heads.hull[1] - heads.hull[0])  # [G, K] of exp(s − peaks)
        self.peaks = torch.full_like(self.sums, -math.inf)  # [G, K]

    def rows(self, s: Tensor, generated: slice) -> tuple[Tensor, Tensor | float]:
        """As :meth:`_Unshifted.rows`; the shift is ``[G, R]``."""
        columns = s[:, generated, self.hull]
        if columns.shape[1]:
            peaks = torch.maximum(self.peaks, columns.amax(1))
            shift = _finite(peaks)
            self.sums *= torch.exp(self.peaks - shift)
            self.sums += _exp_(columns - shift.unsqueeze(1)).sum(1)
            self.peaks = peaks
        shift = _finite(s.amax(2))
        return _exp_(s.sub_(shift.unsqueeze(2))), shift

    def holds(self, row_lse: Tensor) -> bool:
        return True

    def lse(self) -> Tensor:
        return self.peaks + self.sums.log()

    def shares(self, s: Tensor, keys: Span) -> Tensor:
        lse = _finite(self.lse()[:, keys[0] - self.hull.start : keys[1] - self.hull.start])
        return _exp_(s.sub_(lse.unsqueeze(1))).sum(2)


class _First(NamedTuple):
    """What the first sweep found; lists hold one tensor per reference."""

    columns: _Unshifted | _Shifted
    weighted: list[Tensor]  # [G, 1 + regions, K] row probabilities, summed over the queries with each of the weights
    mass: list[Tensor]  # [G, Q]
    whole: Tensor | None  # [G, Nq, Nk] exponentials, where all of it was one tile


def _first_sweep(heads: _Heads, columns: _Unshifted | _Shifted, out: Tensor | None, row_lse: Tensor) -> _First:
    """Writes ``out`` and ``row_lse``; everything that needs only the row normalisers is final."""
    G, Nq, _ = heads.q.shape
    Nk, (n_weights, Q) = heads.k.shape[1], heads.weights.shape
    weighted = [heads.k.new_zeros(G, n_weights, b - a) for a, b in heads.keys]
    mass = [heads.k.new_zeros(G, Q) for _ in heads.keys]
    for rows in heads.rows(0, Nq, Nk):
        here, there = heads.generated(rows)
        e, shift = columns.rows(heads.logits(rows, (0, Nk), columns.unit), here)  # [G, R, Nk]
        sums = e.sum(2)  # [G, R]
        torch.add(sums.log(), shift, out=row_lse[:, rows])
        inverse = sums.reciprocal().masked_fill_(sums == 0, 0.0)  # a fully masked row gives zeros
        if out is not None:
            product = _product(e, heads.v.transpose(1, 2))[..., : out.shape[-1]]
            torch.mul(product, inverse.unsqueeze(2), out=out[:, rows])
        weights = heads.weights[:, there] * inverse[:, None, here]  # [G, 1 + regions, R]
        for n, (a, b) in enumerate(heads.keys):
            spent = e[:, here, a:b]
            weighted[n] += weights @ spent
            torch.mul(spent.sum(2), inverse[:, here], out=mass[n][:, there])
    whole = e if columns.reusable and rows == slice(0, Nq) else None
    return _First(columns, weighted, mass, whole)


def _second_sweep(heads: _Heads, first: _First) -> Iterator[Tensor]:
    """R2G of each reference, ``[G, Q]``."""
    for keys in heads.keys:
        width = keys[1] - keys[0]
        if first.whole is not None:
            shares = first.columns.shares_of(first.whole[:, slice(*heads.queries), slice(*keys)], keys)
        else:
            shares = torch.cat(
                [
                    first.columns.shares(heads.logits(rows, keys, first.columns.unit), keys)
                    for rows in heads.rows(*heads.queries, width)
                ],
                1,
            )
        yield shares / width


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ`` of ``[G, M, d]`` and ``[G, N, d]``; float32 goes to oneDNN, on AMD twice as fast as torch's own BLAS."""
    if a.shape[0] == 1 and a.dtype == torch.float32 and a.is_cpu and _linear is not None and a.is_contiguous():
        return _linear(a[0], b[0], None, "none", [], "").unsqueeze(0)
    return torch.bmm(a, b.transpose(1, 2))


_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _exp_(x: Tensor) -> Tensor:
    return x.mul_(LOG2E).exp2_()


def _finite(x: Tensor) -> Tensor:
    """A shift that can be subtracted: where everything is masked (-inf) there is nothing to shift."""
    return x.masked_fill(x.isneginf(), 0.0)


def _unexpanded(mask: Tensor) -> Tensor:
    """Axes that were only expanded, back to length 1."""
    for axis in range(mask.ndim):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _cut(mask: Tensor, axis: int, part: slice) -> Tensor:
    return mask if mask.shape[axis] == 1 else mask[(slice(None),) * axis + (part,)]
