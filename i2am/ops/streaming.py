"""The streaming path: attention and attribution in torch ops, in tiles, never an ``Nq × Nk`` tensor.

What a machine without the Triton kernels runs; any device, float16 to float64 in, float32 statistics (float64 for
float64 inputs). A tile holds every key of a few queries, so its rows' normalisers are known as soon as it is computed:

1. First sweep: ``out``, row log-sum-exp, G2R, mass and SRAM. The column sums are gathered from the same exponentials.
2. Second sweep, over the reference columns only: the logits once more, against the finished column sums, give R2G.
   Where everything fits one tile there is none: the exponentials are still there.

``s`` is a tile of logits, ``e`` one of exponentials, both ``[G, R, Nk]``: ``G`` heads, ``R`` queries. Logits and what
is compared with them are in units of :attr:`_Heads.unit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops.results import Sums
from i2am.ops.tokens import Span

TILE = 5 << 18  # elements: 5 MiB of float32, small enough for the caches, large enough to hide the calls' overhead
SMALL = 1 << 19  # heads share a tile up to this size; beyond it one head at a time has the faster products
NARROW = 48  # with fewer keys a tile lies transposed in memory, so that its long axis is the contiguous one
LANES = 16  # float32 lanes of a vector register: oneDNN's product with V is 1.5× faster when dv is a multiple
HEAVY = 1 << 20  # multiply-adds per head from which oneDNN head by head beats one batched product
LOG2E = math.log2(math.e)  # torch's exp2 is 4× as fast as its exp on x86
WEAK = 2.0**-80  # a column sum below this share of the strongest row may have lost terms that count to underflow
TINY = 1e-30  # below any row sum: its largest term is 1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None,
    regions: Tensor | None,
    queries: Span,
    keys: Sequence[Span],
    sums: Sequence[Sums],
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Compute one attention call and add to the running sums of every reference; see :func:`i2am.ops.accumulate`.

    ``mask`` is expanded to ``[B, H, Nq, Nk]``; spans are ``[start, stop)``; ``col_lse`` covers the hull of ``keys``.
    """
    B, H, Nq, _ = q.shape
    hull = slice(min(a for a, _ in keys), max(b for _, b in keys))  # the columns whose statistics are kept
    out = None if v is None else q.new_empty(B, Nq, H, v.shape[-1]).transpose(1, 2)
    row_lse = q.new_empty(B, H, Nq, dtype=torch.float32)
    col_lse = q.new_empty(B, H, hull.stop - hull.start, dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # the model's own autocast must not reach the statistics
        for at in _groups(q, k):
            heads = _Heads.of(at, q, k, v, mask, scale, queries)
            references = [
                _Reference(
                    slice(*span),
                    s.r2g[at],
                    s.g2r[at],
                    None if s.mass is None else s.mass[at],
                    None if s.sram is None else s.sram[at],
                )
                for span, s in zip(keys, sums, strict=True)
            ]
            columns = _Columns(heads, hull)
            weights = _query_weights(heads, None if regions is None else regions[at[0] % len(regions)])
            whole = _first_sweep(heads, columns, references, weights, None if out is None else out[at], row_lse[at])
            lse, repaired = _column_lse(heads, columns)
            col_lse[at] = lse / heads.unit
            for reference in references:
                if whole is None or repaired:
                    _second_sweep(heads, lse, hull, reference)
                else:
                    _second_look(whole, columns, reference)
    return out, row_lse, col_lse


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the heads that are worked on together: ``(image, heads)``."""
    B, H, Nq, d = q.shape
    step = max(1, min(H, SMALL // (k.shape[2] * max(Nq, d))))
    for b in range(B):
        for h in range(0, H, step):
            yield b, slice(h, min(h + step, H))


class _Reference(NamedTuple):
    """One reference: its keys, and the running sums of these heads."""

    keys: slice
    r2g: Tensor  # [G, Q]
    g2r: Tensor  # [G, K]
    mass: Tensor | None  # [G, Q]
    sram: Tensor | None  # [G, regions, K]


class _Heads(NamedTuple):
    """The inputs of ``G`` heads of one image; keys and values dense, in the dtype of the statistics."""

    q: Tensor  # [G, Nq, d] as given
    k: Tensor  # [G, Nk, d], times scale and unit
    v: Tensor | None  # [G, Nk, dv], dv filled up to LANES with zeros unless the tiles are narrow
    bias: Tensor | None  # [1 | G, 1 | Nq, 1 | Nk], bool or additive
    queries: slice
    unit: float  # logits are unit × the natural ones: LOG2E; 1 with an additive mask, whose finfo.min would overflow

    @classmethod
    def of(
        cls,
        at: tuple[int, slice],
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        mask: Tensor | None,
        scale: float,
        queries: Span,
    ) -> _Heads:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        unit = LOG2E if mask is None or mask.dtype == torch.bool else 1.0
        if v is not None:
            v = v[at].to(dtype)
            v = v if k.shape[2] < NARROW else torch.nn.functional.pad(v, (0, -v.shape[2] % LANES)).contiguous()
        return cls(
            q[at],
            (k[at].to(dtype) * (scale * unit)).contiguous(),
            v,
            None if mask is None else _unexpanded(mask[at]),
            slice(*queries),
            unit,
        )

    def tiles(self, queries: slice, width: int) -> Iterator[slice]:
        """Yield ``queries`` in about equal tiles: at most TILE for ``width`` keys, 4 TILE for their q or out."""
        G, _, d = self.q.shape
        longest = d if self.v is None else max(d, self.v.shape[2])
        most = max(1, TILE // (G * max(width, longest // 4)))
        length = queries.stop - queries.start
        step = -(-length // -(-length // most))
        for start in range(queries.start, queries.stop, step):
            yield slice(start, min(start + step, queries.stop))

    def logits(self, rows: slice, keys: slice | Tensor) -> Tensor:
        q, k = self.q[:, rows].to(self.k.dtype), self.k[:, keys]  # [G, R, d], [G, K, d]
        s = _product(k, q).transpose(1, 2) if k.shape[1] < NARROW else _product(q, k)
        if self.bias is None:
            return s
        bias = self.bias if self.bias.shape[1] == 1 else self.bias[:, rows]
        bias = bias if bias.shape[2] == 1 else bias[:, :, keys]  # [1 | G, 1 | R, 1 | K]
        return s.add_(torch.where(bias, 0.0, -math.inf) if bias.dtype == torch.bool else bias)

    def exp_(self, s: Tensor) -> Tensor:
        return (s if self.unit == LOG2E else s.mul_(LOG2E)).exp2_()

    def log(self, x: Tensor) -> Tensor:
        return x.log().mul_(self.unit)


class _Columns:
    """Log-sum-exp over the generated queries of the columns in ``hull``, from exponentials shifted by rows."""

    def __init__(self, heads: _Heads, hull: slice):
        self.heads, self.hull = heads, hull
        self.top = heads.k.new_full((heads.k.shape[0], 1), -math.inf)  # [G, 1] the largest shift so far
        self.sums = heads.k.new_zeros(heads.k.shape[0], hull.stop - hull.start)  # [G, K] relative to it

    def add(self, e: Tensor, shift: Tensor) -> Tensor:
        """Take up ``e = exp(s − shift)``, ``[G, R, Nk]``; return the rows' weights ``exp(shift − top) [G, R]``."""
        top = torch.maximum(self.top, shift.amax(1, keepdim=True))
        weights = self.heads.exp_(shift - top)  # [G, R]
        self.sums *= self.heads.exp_(self.top - top)
        self.sums += _rows_times(weights, e[:, :, self.hull])
        self.top = top
        return weights


def _query_weights(heads: _Heads, regions: Tensor | None) -> Tensor:
    """Return ``[1 + regions, Q]`` weights over the generated queries: their mean (G2R), then the regions (SRAM)."""
    Q = heads.queries.stop - heads.queries.start
    mean = heads.k.new_full((1, Q), 1.0 / Q)
    return mean if regions is None else torch.cat([mean, regions.to(mean)])


class _Whole(NamedTuple):
    """The exponentials of all generated queries, where one tile holds them, and the weights that undo their shifts."""

    e: Tensor  # [G, Q, Nk]
    weights: Tensor  # [G, Q]


def _first_sweep(
    heads: _Heads,
    columns: _Columns,
    references: list[_Reference],
    weights: Tensor,
    out: Tensor | None,
    row_lse: Tensor,
) -> _Whole | None:
    """Write ``out`` and ``row_lse``, adds G2R, mass and SRAM, gathers the column sums."""
    (G, Nq, _), Nk = heads.q.shape, heads.k.shape[1]
    whole = None
    spent = [heads.k.new_zeros(G, len(weights), r.keys.stop - r.keys.start) for r in references]  # [G, 1 + regions, K]
    for rows in heads.tiles(slice(0, Nq), Nk):
        s = heads.logits(rows, slice(0, Nk))
        shift = _finite(s.amax(2))  # [G, R]
        e = heads.exp_(s.sub_(shift.unsqueeze(2)))  # [G, R, Nk]
        sums = e.sum(2)  # [G, R]
        row_lse[:, rows] = (heads.log(sums) + shift) / heads.unit
        inverse = sums.clamp_min_(TINY).reciprocal_()  # a fully masked row, all zeros, stays so
        if out is not None and heads.v is not None:
            _write_output(out[:, rows], e, heads.v, inverse)
        first, last = max(rows.start, heads.queries.start), min(rows.stop, heads.queries.stop)
        if first >= last:
            del s, e
            continue
        here = slice(first - rows.start, last - rows.start)  # the generated queries' place in the tile
        there = slice(first - heads.queries.start, last - heads.queries.start)  # and among themselves
        e, inverse = e[:, here], inverse[:, here]
        undo = columns.add(e, shift[:, here])  # [G, R]
        for reference, total in zip(references, spent, strict=True):
            total += _rows_times(weights[:, there] * inverse.unsqueeze(1), e[:, :, reference.keys])
            if reference.mass is not None:
                reference.mass[:, there].add_(e[:, :, reference.keys].sum(2).mul_(inverse))
        if rows == slice(0, Nq):
            whole = _Whole(e, undo)
        del s, e  # before the next tile is allocated, which then takes their place in the caches
    for reference, total in zip(references, spent, strict=True):
        reference.g2r.add_(total[:, 0])
        if reference.sram is not None:
            reference.sram.add_(total[:, 1:])
    return whole


def _write_output(out: Tensor, e: Tensor, v: Tensor, inverse: Tensor) -> None:
    """Write ``out = inverse · e v``, with the factor where there are fewer numbers to multiply."""
    if e.shape[2] >= NARROW:
        torch.mul(_product(e, v.transpose(1, 2))[..., : out.shape[2]], inverse.unsqueeze(2), out=out)
    elif out.dtype == v.dtype:
        torch.bmm(e * inverse.unsqueeze(2), v, out=out)
    else:
        out.copy_(torch.bmm(e * inverse.unsqueeze(2), v))


def _column_lse(heads: _Heads, columns: _Columns) -> tuple[Tensor, bool]:
    """Return the log-sum-exp of the columns, ``[G, K]``, and whether some had to be computed anew.

    Columns far below the strongest row are: their terms underflowed. So are fully masked ones (-inf).
    """
    lse = heads.log(columns.sums) + columns.top
    weak = (columns.sums < WEAK).any(0).nonzero().squeeze(1)  # [W]
    if len(weak) == 0:
        return lse, False
    exact = torch.full_like(lse[:, weak], -math.inf)
    for rows in heads.tiles(heads.queries, len(weak)):
        s = heads.logits(rows, weak + columns.hull.start)  # [G, R, W]
        exact = torch.logaddexp(exact, torch.logsumexp(s / heads.unit, 1))
    lse[:, weak] = exact * heads.unit
    return lse, True


def _second_sweep(heads: _Heads, lse: Tensor, hull: slice, reference: _Reference) -> None:
    """Add R2G: every generated query's share of the reference's columns, given their log-sum-exp."""
    width = reference.keys.stop - reference.keys.start
    lse = _finite(_within(lse, hull, reference)).unsqueeze(1)  # [G, 1, K]
    for rows in heads.tiles(heads.queries, width):
        c = heads.exp_(heads.logits(rows, reference.keys).sub_(lse))  # [G, R, K] column probabilities
        there = slice(rows.start - heads.queries.start, rows.stop - heads.queries.start)
        reference.r2g[:, there].add_(c.sum(2), alpha=1.0 / width)
        del c


def _second_look(whole: _Whole, columns: _Columns, reference: _Reference) -> None:
    """Do what :func:`_second_sweep` does, from the exponentials at hand."""
    width = reference.keys.stop - reference.keys.start
    sums = _within(columns.sums, columns.hull, reference)  # [G, K]
    shares = _rows_times(sums.reciprocal(), whole.e[:, :, reference.keys].transpose(1, 2))  # [G, Q]
    reference.r2g.add_(shares.mul_(whole.weights), alpha=1.0 / width)


def _within(x: Tensor, hull: slice, reference: _Reference) -> Tensor:
    """Return the reference's columns of ``x [G, hull]``."""
    return x[:, reference.keys.start - hull.start : reference.keys.stop - hull.start]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a bᵀ`` of ``[G, M, d]`` and ``[G, N, d]``; float32 by oneDNN, on AMD twice as fast as torch's choice."""
    G, M, d = a.shape
    if _linear is not None and a.is_cpu and a.dtype == torch.float32 and (G == 1 or M * b.shape[1] * d >= HEAVY):
        products = [_linear(x, _dense(y), None, "none", [], "") for x, y in zip(a, b, strict=True)]
        return products[0].unsqueeze(0) if G == 1 else torch.stack(products)
    return torch.bmm(a, b.transpose(1, 2))


def _dense(x: Tensor) -> Tensor:
    """Return ``x [N, d]``, copied if its rows lie apart: for those oneDNN falls back to a loop 1000× as slow."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _rows_times(weights: Tensor, e: Tensor) -> Tensor:
    """Return ``Σ_i weights[i] · e[i, :]``: ``[G, (W,) R]`` by ``[G, R, K]`` → ``[G, (W,) K]``."""
    if weights.ndim == 2:
        return torch.bmm(weights.unsqueeze(1), e).squeeze(1)
    return torch.bmm(weights, e)


def _finite(x: Tensor) -> Tensor:
    """Return what to subtract: nothing where everything is masked (-inf)."""
    return x.masked_fill(x.isneginf(), 0.0)


def _unexpanded(mask: Tensor) -> Tensor:
    """Return a tensor with axes that were only expanded back at length 1."""
    for axis, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _keep_freed_memory() -> None:
    """Have glibc reuse a freed tile. By default it goes back to the system, and its page faults cost 4× its arithmetic.

    Freeing one large block (never touched) raises the size from which malloc does so to its maximum of 32 MiB.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


_keep_freed_memory()
