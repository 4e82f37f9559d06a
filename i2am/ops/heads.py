"""A few heads of one image, what both forms of the streaming path work on, and how to walk them in tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

LOG2E = math.log2(math.e)  # logits are in log2 units: torch's exp2 is 4× as fast as its exp on x86
HEAVY = 1 << 20  # multiply-adds per head from which oneDNN head by head beats one batched product
LARGE = 1e30  # a logit that cannot overflow, nor together with the lowest float32 of an additive mask


class Reference(NamedTuple):
    """One reference: its keys, and the running sums of these heads."""

    keys: slice
    r2g: Tensor  # [G, Q]
    g2r: Tensor  # [G, K]
    mass: Tensor | None  # [G, Q]
    sram: Tensor | None  # [G, regions, K]

    @property
    def size(self) -> int:
        """Return the number of its keys."""
        return int(self.keys.stop - self.keys.start)

    def add(self, spent: Tensor) -> None:
        """Add ``spent [G, 1 + regions, K]`` to G2R and SRAM."""
        self.g2r.add_(spent[:, 0])
        if self.sram is not None:
            self.sram.add_(spent[:, 1:])


class Heads(NamedTuple):
    """The inputs and outputs of ``G`` heads of one image."""

    q: Tensor  # [G, Nq, d] as given
    k: Tensor  # [G, Nk, d] as given
    v: Tensor | None  # [G, Nk, dv] as given
    bias: Tensor | None  # [1 | G, 1 | Nq, 1 | Nk], bool or additive
    scale: float
    queries: slice  # the generated ones
    hull: slice  # the keys of which there are column statistics
    weights: Tensor  # [1 + regions, Q] of the generated queries: their mean (G2R), then the regions (SRAM)
    references: Sequence[Reference]
    out: Tensor | None  # [G, Nq, dv]
    row_lse: Tensor  # [G, Nq]

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        mask: Tensor | None,
        regions: Tensor | None,
        *,
        scale: float,
        queries: slice,
        hull: slice,
        references: Sequence[Reference],
        out: Tensor | None,
        row_lse: Tensor,
    ) -> Heads:
        """Collect what one group of heads needs; ``mask`` is ``[G, Nq, Nk]``, ``regions`` ``[R, Q]``."""
        Q = queries.stop - queries.start
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        mean = q.new_full((1, Q), 1.0 / Q, dtype=dtype)
        weights = mean if regions is None else torch.cat([mean, regions.to(mean)])
        bias = None if mask is None else _unexpanded(mask)
        return cls(q, k, v, bias, scale, queries, hull, weights, references, out, row_lse)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the statistics."""
        return self.weights.dtype

    @property
    def keeps_mass(self) -> bool:
        """Return whether mass is kept: of every reference or of none."""
        return self.references[0].mass is not None

    def may_overflow(self) -> bool:
        """Return whether a logit, or one together with an additive mask, may be beyond float32, or is not finite."""
        return not largest(self.q) * largest(self.k) * self.q.shape[2] * abs(self.scale) < LARGE  # so where one is NaN

    def masks_broken_values(self) -> bool:
        """Return whether there is a mask, and a value that is not finite, which it may leave out."""
        return self.bias is not None and self.v is not None and not bool(self.v.isfinite().all())

    def allowed(self, rows: slice, keys: slice | Tensor) -> Tensor:
        """Return which pairs a mask leaves in, ``[1 | G, 1 | R, 1 | K]`` bool; only where there is a mask."""
        bias = self.part_of_bias(rows, keys)
        return bias if bias.dtype == torch.bool else ~bias.isneginf()

    def part_of_bias(self, rows: slice, keys: slice | Tensor) -> Tensor:
        """Return a tile of the mask, ``[1 | G, 1 | R, 1 | K]``."""
        assert self.bias is not None
        bias = self.bias if self.bias.shape[1] == 1 else self.bias[:, rows]
        return bias if bias.shape[2] == 1 else bias[:, :, keys]


class Sweeps(Protocol):
    """Both sweeps over a few heads, by pieces of their queries."""

    def first(self, rows: slice) -> Any:
        """Write the output and row log-sum-exp of some queries; return what their columns need."""

    def columns(self, parts: Sequence[Any]) -> Tensor | None:
        """Merge that of all queries; return the columns' log-sum-exp, None if this form cannot tell it."""

    def second(self, rows: slice) -> Any:
        """Add R2G of some generated queries; return what the reference's sums need."""

    def finish(self, parts: Sequence[Any]) -> None:
        """Add the reference's sums."""


def in_steps(span: slice, step: int) -> Iterator[slice]:
    """Yield ``span`` in parts of ``step``, the last one shorter."""
    for start in range(span.start, span.stop, step):
        yield slice(start, min(start + step, span.stop))


def evenly(span: slice, most: int) -> Iterator[slice]:
    """Yield ``span`` in parts of about equal size, at most ``most``."""
    length = span.stop - span.start
    return in_steps(span, -(-length // -(-length // most))) if length > 0 else iter(())


def both(one: slice, other: slice) -> slice:
    """Return what two spans share; empty (stop = start) where they share nothing."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))


def within(span: slice, outer: slice) -> slice:
    """Return where ``span`` lies in ``outer``."""
    return slice(span.start - outer.start, span.stop - outer.start)


def largest(x: Tensor) -> float:
    """Return the largest magnitude in ``x``; NaN if there is one."""
    low, high = torch.aminmax(x)  # six times as fast as a norm
    return float(torch.maximum(-low, high))


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, in their order."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``a b`` of ``[G, M, d]`` and ``[G, d, N]``; on AMD by oneDNN, twice as fast there as torch's choice."""
    (G, M, d), N = a.shape, b.shape[2]
    if not (_prefers_onednn() and a.is_cpu and a.dtype == torch.float32 and (G == 1 or M * N * d >= HEAVY)):
        return torch.bmm(a, b, out=out)
    assert _linear is not None
    products = [_linear(x, _dense(y), None, "none", [], "") for x, y in zip(a, b.transpose(1, 2), strict=True)]
    found = products[0].unsqueeze(0) if G == 1 else torch.stack(products)
    return found if out is None else out.copy_(found)


def _dense(x: Tensor) -> Tensor:
    """Return ``x [N, d]``, copied if its rows lie apart: for a view among others oneDNN has a loop 1000× as slow."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _prefers_onednn() -> bool:
    """Return whether float32 products are faster by oneDNN than by the BLAS that torch is built with."""
    if _linear is None or not torch._C._has_mkldnn:
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def _unexpanded(mask: Tensor) -> Tensor:
    """Return ``mask`` with the axes that were only expanded back at length 1."""
    for axis, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask
