"""Tiled sweeps over the logits in torch ops: what read-outs and their gradients are made of, on any device.

A sweep walks over tiles of a few queries × all keys and never holds an ``Nq × Nk`` tensor. Statistics are float32
(float64 for float64 inputs) whatever the inputs are. With queries and keys exchanged the same three sweeps serve the
column softmax. Where PyTorch's own flash attention can carry the columns (:mod:`i2am.ops.flash`), it does.

``s`` is a tile of logits and ``p`` one of probabilities, ``[G, R, Nk]``: ``G`` heads of one image, ``R`` queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops import flash

CPU_TILE, GPU_TILE = 1 << 20, 1 << 24  # elements: what stays in a CPU's caches; what keeps a GPU busy
LOG2E = math.log2(math.e)  # torch's exp2 is 4× as fast as its exp on x86
TINY = 1e-30  # below any row sum that is not 0
IMPOSSIBLE = -1e4  # ln p of a pair that is masked: p ln p is 0 there, and must not be 0 · inf


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
    for at, heads in _heads(q, k, mask, scale):
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
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``P values [B, H, Nq, w]`` and ``Pᵀ weights [B, H, Nk, u]`` for ``P = exp(scale q kᵀ + mask − lse)``.

    Args:
        q, k, scale, mask: as in :func:`attend`; ``k`` may hold some of the keys only that ``lse`` is about.
        lse: ``[B, H, Nq]`` natural log-sum-exp.
        values: ``[B, H, Nk, w]``.
        weights: ``[B, H, Nq, u]``.
    """
    B, H, Nq, _ = q.shape
    across = None if values is None else lse.new_empty(B, H, Nq, values.shape[-1])
    down = None if weights is None else lse.new_zeros(B, H, weights.shape[-1], k.shape[2])
    for at, heads in _heads(q, k, mask, scale):
        for rows in heads.tiles():
            p = heads.exp_(heads.below(rows, lse[at][:, rows]))  # [G, R, Nk]
            if across is not None and values is not None:
                across[at][:, rows] = torch.bmm(p, values[at])
            if down is not None and weights is not None:
                down[at].add_(torch.bmm(weights[at][:, rows].transpose(1, 2), p))
            del p
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
    if surprise is None and flash.takes(q, left.shape[-1] + 1, mask):
        return flash.backward(q, k, lse, left, right, delta, scale=scale, outputs=outputs)
    (B, H, Nq, d), Nk = q.shape, k.shape[2]
    dq, dk, dv = lse.new_empty(B, H, Nq, d), lse.new_zeros(B, H, Nk, d), lse.new_zeros(B, H, Nk, outputs)
    left = torch.cat([left, -delta.unsqueeze(3)], 3)
    right = torch.cat([right, right.new_ones(B, H, Nk, 1)], 3)
    for at, heads in _heads(q, k, mask, scale):
        plain = k[at].to(lse.dtype) * scale  # [G, Nk, d]
        r = right[at].contiguous()
        for rows in heads.tiles():
            s = heads.logits(rows)  # [G, R, Nk]
            below = None if surprise is None else (s / heads.unit).clamp_min_(IMPOSSIBLE)  # ln p, up to a constant
            p = heads.exp_(heads.below_(s, lse[at][:, rows]))
            l = left[at][:, rows]  # [G, R, w + 1]
            if outputs:
                dv[at].add_(torch.bmm(p.transpose(1, 2), l[..., :outputs]))
            ds = torch.bmm(l, r.transpose(1, 2))  # [G, R, Nk]
            if below is not None and surprise is not None:
                below.sub_((below * p).sum(2, keepdim=True) / p.sum(2, keepdim=True).clamp_min_(TINY))
                ds.addcmul_(below, surprise[at][:, rows].unsqueeze(2))
            ds.mul_(p)
            dq[at][:, rows] = torch.bmm(ds, plain)
            dk[at].add_(torch.bmm(ds.transpose(1, 2), heads.q[:, rows].to(lse.dtype)), alpha=scale)
            del s, p, ds, below
    return dq, dk, dv


class _Heads(NamedTuple):
    """``G`` heads of one image."""

    q: Tensor  # [G, Nq, d] as given
    k: Tensor  # [G, Nk, d], times scale and unit, in the dtype of the statistics
    bias: Tensor | None  # [G, Nq, Nk], bool or additive
    unit: float  # logits are unit × the natural ones: LOG2E; 1 with an additive mask, whose finfo.min would overflow

    def tiles(self) -> Iterator[slice]:
        """Yield the queries in tiles of about equal size."""
        (G, Nq, d), Nk = self.q.shape, self.k.shape[1]
        most = max(1, (CPU_TILE if self.q.is_cpu else GPU_TILE) // (G * max(Nk, d)))
        step = -(-Nq // -(-Nq // most))
        for start in range(0, Nq, step):
            yield slice(start, min(start + step, Nq))

    def logits(self, rows: slice) -> Tensor:
        """Return a tile of logits ``[G, R, Nk]``."""
        s = torch.bmm(self.q[:, rows].to(self.k.dtype), self.k.transpose(1, 2))
        if self.bias is None:
            return s
        bias = self.bias[:, rows]
        return s.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else s.add_(bias)

    def below(self, rows: slice, lse: Tensor) -> Tensor:
        """Return a tile of logits less their rows' ``lse [G, R]``: ln p in their unit, -inf where all is masked."""
        return self.below_(self.logits(rows), lse)

    def below_(self, s: Tensor, lse: Tensor) -> Tensor:
        """Return logits ``s [G, R, Nk]`` less their rows' ``lse [G, R]``, in their memory."""
        return s.sub_(_finite(lse * self.unit).unsqueeze(2))

    def exp_(self, s: Tensor) -> Tensor:
        """Return the exponential of ``s``, in its memory."""
        return (s if self.unit == LOG2E else s.mul_(LOG2E)).exp2_()


def _heads(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Iterator[tuple[tuple[int, slice], _Heads]]:
    """Yield the heads that share tiles, and their place ``(image, heads)``."""
    B, H, Nq, _ = q.shape
    unit = LOG2E if mask is None or mask.dtype == torch.bool else 1.0
    step = max(1, min(H, (CPU_TILE if q.is_cpu else GPU_TILE) // (k.shape[2] * min(Nq, 256))))
    for b in range(B):
        for h in range(0, H, step):
            at = b, slice(h, min(h + step, H))
            keys = (k[at].to(statistic(k.dtype)) * (scale * unit)).contiguous()
            yield at, _Heads(q[at], keys, None if mask is None else mask[at], unit)


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x.isneginf(), 0.0)
