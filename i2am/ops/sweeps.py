"""Tiled sweeps over the logits in torch ops: what read-outs and their gradients are made of, on any device.

A sweep walks over tiles of a few queries × all keys and never holds an ``Nq × Nk`` tensor. Statistics are float32
(float64 for float64 inputs) whatever the inputs are. With queries and keys exchanged the same three sweeps serve the
column softmax. Where PyTorch's own flash attention can carry the columns (:mod:`i2am.ops.flash`), it does. On a CPU the
heads run side by side (:mod:`i2am.ops.workers`).

``s`` is a tile of logits and ``p`` one of probabilities, ``[G, R, Nk]``: ``G`` heads of one image, ``R`` queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops import flash, workers
from i2am.ops.heads import evenly, product

CPU_TILE, GPU_TILE = 1 << 20, 1 << 24  # elements: what stays in a CPU's caches; what keeps a GPU busy
KEYS, PART = 512, 1 << 18  # keys and elements of a tile that is a part of rows, on a CPU: for a core's own cache
LOG2E = math.log2(math.e)  # torch's exp2 is 4× as fast as its exp on x86
SMALL = 1 << 20  # logits of a call for which float64 costs milliseconds
TINY = 1e-30  # below any row sum that is not 0
IMPOSSIBLE = -1e4  # ln p of a pair that is masked: p ln p is 0 there, and must not be 0 · inf

Place = tuple[int, slice]  # an image and some of its heads


def costs_little(q: Tensor, k: Tensor) -> bool:
    """Return whether a call of ``[B, H, Nq, d]`` and ``[B, H, Nk, d]`` is so small that float64 costs milliseconds."""
    return q[..., 0].numel() * k.shape[2] <= SMALL


def statistic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of every statistic for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor, k: Tensor, values: Tensor, *, scale: float, mask: Tensor | None, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``P values [B, H, Nq, w]``, the rows' natural log-sum-exp and entropy ``[B, H, Nq]``, for the softmax P.

    Args:
        q: ``[B, H, Nq, d]``.
        k: ``[B, H, Nk, d]``.
        values: ``[B, H, Nk, w]``, in the dtype of the statistics; ``w`` may be 0.
        scale: multiplies ``q kᵀ``.
        mask: ``[B, H, Nq, Nk]`` bool (True = take part) or additive, or None. A fully masked row: zeros, -inf, 0.
        entropy: whether ``−Σ p ln p`` is computed; else None is returned for it.
    """
    if not entropy and flash.takes(q, values.shape[-1], mask):
        return *flash.attend(q, k, values, scale), None
    B, H, Nq, _ = q.shape
    out, lse = values.new_empty(B, H, Nq, values.shape[-1]), values.new_empty(B, H, Nq)
    spread = values.new_empty(B, H, Nq) if entropy else None

    def sweep(at: Place, heads: _Heads) -> None:
        v = values[at].contiguous()  # [G, Nk, w]
        for rows in heads.tiles():
            s = heads.logits(rows)  # [G, R, Nk]
            s.sub_(top := _finite(s.amax(2, keepdim=True)))  # [G, R, Nk] less [G, R, 1]
            below = (s / heads.unit).clamp_min_(IMPOSSIBLE) if entropy else None  # ln p, up to the row's constant
            e = heads.exp_(s)
            inverse = (total := e.sum(2, keepdim=True)).reciprocal().masked_fill_(total == 0, 0.0)  # [G, R, 1]
            lse[at][:, rows] = (total.log() + top / heads.unit).squeeze(2)
            if below is not None and spread is not None:
                mean = below.mul_(e).sum(2, keepdim=True).mul_(inverse)  # [G, R, 1]
                spread[at][:, rows] = (total.log() - mean).masked_fill_(total == 0, 0.0).squeeze(2)
            out[at][:, rows] = torch.bmm(e, v).mul_(inverse)
            del s, e, below  # before the next tile is allocated, which then takes their place in the caches

    _each(q, k, mask, scale, sweep)
    return out, lse, spread


def weigh(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    values: Tensor | None = None,
    weights: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``P values [B, H, Nq, w]`` and ``Pᵀ weights [B, H, Nk, u]`` for ``P = exp(scale q kᵀ + mask − lse)``.

    Args:
        q, k, scale, mask: as in :func:`attend`; ``k`` may hold some of the keys only that ``lse`` is about.
        lse: ``[B, H, Nq]`` natural log-sum-exp.
        values: ``[B, H, Nk, w]``.
        weights: ``[B, H, Nq, u]``.
        entropy: ``[B, H, Nq]`` to be filled with ``−Σ p ln p``, or None.
    """
    B, H, Nq, _ = q.shape
    across = None if values is None else lse.new_zeros(B, H, Nq, values.shape[-1])
    down = None if weights is None else lse.new_zeros(B, H, weights.shape[-1], k.shape[2])
    if entropy is not None:
        entropy.zero_()

    def sweep(at: Place, heads: _Heads) -> None:
        below, own = heads.relative_to(lse[at]), None if values is None else values[at].contiguous()
        room, second = heads.room(), heads.room() if entropy is not None else None
        for rows, keys in heads.parts():
            s = below(rows, keys, room)  # log p in their unit
            if entropy is not None:
                assert second is not None
                s = s if heads.bias is None else s.clamp_min_(IMPOSSIBLE)
                p = heads.exp_to(s, second)
                entropy[at][:, rows].sub_(s.mul_(p).sum(2), alpha=1.0 / heads.unit)
            else:
                p = heads.exp_(s)  # [G, R, K]
            if across is not None and own is not None:
                across[at][:, rows].baddbmm_(p, own[:, keys])
            if down is not None and weights is not None:
                down[at][:, :, keys].baddbmm_(weights[at][:, rows].transpose(1, 2), p)

    _each(q, k, mask, scale, sweep)
    return across, None if down is None else down.transpose(2, 3)


def backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    left: Tensor,
    right: Tensor,
    delta: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    outputs: int = 0,
    surprise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dq``, ``dk`` and ``dv`` of ``dS = P ∘ (left rightᵀ − delta + surprise (ln P − mean of ln P under P))``.

    The mean is taken here and not from the entropy: where P is nearly uniform, the difference is small.

    Args:
        q, k, lse, scale, mask: as in :func:`weigh`.
        left: ``[B, H, Nq, w]``; its first ``outputs`` columns are the gradient of the attention output.
        right: ``[B, H, Nk, w]``.
        delta: ``[B, H, Nq]``.
        outputs: width of ``dv = Pᵀ left[..., :outputs]``.
        surprise: ``[B, H, Nq]`` factor of ``ln P``, for the entropy; or None.

    Returns:
        ``dq [B, H, Nq, d]``, ``dk [B, H, Nk, d]``, ``dv [B, H, Nk, outputs]``, in the dtype of the statistics.
    """
    if surprise is None and flash.takes(q, left.shape[-1] + 1, mask, pays=True):
        return flash.backward(q, k, lse, left, right, delta, scale=scale, outputs=outputs)
    (B, H, Nq, d), Nk = q.shape, k.shape[2]
    dq, dk, dv = lse.new_zeros(B, H, Nq, d), lse.new_zeros(B, H, Nk, d), lse.new_zeros(B, H, Nk, outputs)
    left = torch.cat([left, -delta.unsqueeze(3)], 3)
    right = torch.cat([right, right.new_ones(B, H, Nk, 1)], 3)

    def sweep(at: Place, heads: _Heads) -> None:
        plain = k[at].to(lse.dtype) * scale  # [G, Nk, d]
        r = right[at].transpose(1, 2)  # [G, w + 1, Nk]
        below = heads.relative_to(None if surprise is not None else lse[at])
        size = None if surprise is None else CPU_TILE if q.is_cpu else GPU_TILE
        first, second, third = heads.room(size), heads.room(size), heads.room(size if surprise is not None else 0)
        for rows, keys in heads.parts() if surprise is None else heads.whole():
            s = below(rows, keys, first)  # [G, R, K]
            l = left[at][:, rows]  # [G, R, w + 1]
            if surprise is None:
                p = heads.exp_(s)
                ds = product(l, r[:, :, keys], _shaped(second, s))
            else:
                p = torch.sub(s, _finite(lse[at][:, rows] * heads.unit).unsqueeze(2), out=_shaped(third, s))
                p = heads.exp_(p)
                s = s if heads.bias is None else s.clamp_min_(IMPOSSIBLE * heads.unit)
                mean = torch.mul(s, p, out=_shaped(second, s)).sum(2, keepdim=True)
                s.sub_(mean / p.sum(2, keepdim=True).clamp_min_(TINY))
                ds = product(l, r, _shaped(second, s))
                ds.addcmul_(s, surprise[at][:, rows].unsqueeze(2), value=1.0 / heads.unit)
            if outputs:
                dv[at][:, keys].baddbmm_(p.transpose(1, 2), l[..., :outputs])
            ds.mul_(p)
            dq[at][:, rows].baddbmm_(ds, plain[:, keys])
            dk[at][:, keys].baddbmm_(ds.transpose(1, 2), heads.q[:, rows].to(lse.dtype), alpha=scale)

    _each(q, k, mask, scale, sweep)
    return dq, dk, dv


class _Heads(NamedTuple):
    """``G`` heads of one image."""

    q: Tensor  # [G, Nq, d] as given
    k: Tensor  # [G, Nk, d], times scale and unit, in the dtype of the statistics
    bias: Tensor | None  # [G, Nq, Nk], bool or additive
    unit: float  # logits are unit × the natural ones: LOG2E; 1 with an additive mask, whose finfo.min would overflow

    def tiles(self) -> Iterator[slice]:
        """Yield the queries in tiles of about equal size, with all keys."""
        (G, Nq, d), Nk = self.q.shape, self.k.shape[1]
        return evenly(slice(0, Nq), max(1, (CPU_TILE if self.q.is_cpu else GPU_TILE) // (G * max(Nk, d))))

    def whole(self) -> Iterator[tuple[slice, slice]]:
        """Yield the same tiles with their keys."""
        everything = slice(0, self.k.shape[1])
        return ((rows, everything) for rows in self.tiles())

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Yield tiles of some queries and some keys."""
        (G, Nq, d), Nk = self.q.shape, self.k.shape[1]
        width, most = (KEYS, PART) if self.q.is_cpu else (Nk, GPU_TILE)
        for rows in evenly(slice(0, Nq), max(1, most // (G * max(min(width, Nk), d)))):
            for keys in evenly(slice(0, Nk), width):
                yield rows, keys

    def room(self, size: int | None = None) -> Tensor:
        """Return memory for a tile of ``size`` elements, by default of :meth:`parts`; the next one takes it again."""
        G, Nk, _ = self.k.shape
        if size is None:
            width, most = (KEYS, PART) if self.q.is_cpu else (Nk, GPU_TILE)
            size = max(most, G * min(width, Nk))
        elif size:
            size = max(size, G * Nk)
        return self.k.new_empty(size)

    def logits(self, rows: slice) -> Tensor:
        """Return a tile of logits ``[G, R, Nk]``."""
        everything = slice(0, self.k.shape[1])
        return self._masked(product(self.q[:, rows].to(self.k.dtype), self.k.transpose(1, 2)), rows, everything)

    def relative_to(self, lse: Tensor | None) -> Callable[[slice, slice, Tensor], Tensor]:
        """Return what computes a tile of logits less their rows' ``lse [G, Nq]``, in the memory given to it.

        The log-sum-exp is one more column of q, that of k holding ones: subtracting it costs nothing.
        """
        q, k = self.q, self.k
        if lse is not None:
            q = torch.cat([q.to(k.dtype), -_finite(lse * self.unit).unsqueeze(2)], 2)
            k = torch.cat([k, torch.ones_like(k[:, :, :1])], 2)
        k = k.transpose(1, 2)

        def below(rows: slice, keys: slice, room: Tensor) -> Tensor:
            shape = len(k), rows.stop - rows.start, keys.stop - keys.start
            room = room[: math.prod(shape)].view(shape)
            return self._masked(product(q[:, rows].to(k.dtype), k[:, :, keys], room), rows, keys)

        return below

    def _masked(self, s: Tensor, rows: slice, keys: slice) -> Tensor:
        if self.bias is None:
            return s
        bias = self.bias[:, rows, keys]
        return s.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else s.add_(bias)

    def exp_(self, s: Tensor) -> Tensor:
        """Return the exponential of ``s``, in its memory."""
        return (s if self.unit == LOG2E else s.mul_(LOG2E)).exp2_()

    def exp_to(self, s: Tensor, room: Tensor) -> Tensor:
        """Return the exponential of a tile ``s`` in other memory."""
        room = _shaped(room, s)
        return torch.exp2(s, out=room) if self.unit == LOG2E else torch.mul(s, LOG2E, out=room).exp2_()


def _each(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, sweep: Callable[[Place, _Heads], None]) -> None:
    """Call ``sweep`` for the heads that share tiles, with their place."""
    B, H, Nq, _ = q.shape
    unit = LOG2E if mask is None or mask.dtype == torch.bool else 1.0
    step = max(1, min(H, (CPU_TILE if q.is_cpu else GPU_TILE) // (k.shape[2] * min(Nq, 256))))

    def one(at: Place) -> None:
        keys = (k[at].to(statistic(k.dtype)) * (scale * unit)).contiguous()
        sweep(at, _Heads(q[at], keys, None if mask is None else mask[at], unit))

    places = [(b, slice(h, min(h + step, H))) for b in range(B) for h in range(0, H, step)]
    workers.run([partial(one, at) for at in places], lambda found: None, q.device)


def _shaped(room: Tensor, like: Tensor) -> Tensor:
    """Return what of ``room`` a tile takes, in its shape."""
    return room[: like.numel()].view(like.shape)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x.isneginf(), 0.0)
