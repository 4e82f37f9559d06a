"""The definitions, in eager float64: what every other implementation is held to.

This module materialises the ``[B, H, Nq, Nk]`` attention on purpose, in the plainest form the equations have. It is the
truth in the tests and a peer in the benchmarks, never a fast path.

Notation (I2AM, Park & Jang, ICLR 2025, sections 3.1 and 3.2): ``S = scale * Q K^T + bias``; ``queries`` is the set of
*generated* tokens, ``keys`` the set of *reference* tokens, both possibly subsets of what the attention sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from i2am.ops.results import AttentionOutput


def logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Return ``scale * Q K^T + bias`` in float64, ``[B, H, Nq, Nk]``; -inf where masked, whatever q and k hold there.

    Masked is a False of a bool mask and a -inf of an additive one. A product that overflows to -inf is NaN, not masked.
    """
    s = q.double() @ k.double().transpose(-1, -2) * scale  # [B, H, Nq, Nk]
    s = s.masked_fill(s.isneginf(), float("nan"))
    if mask is None:
        return s
    s = s if mask.dtype == torch.bool else s + mask.double()
    return s.masked_fill(~takes_part(mask), float("-inf"))


def takes_part(mask: Tensor) -> Tensor:
    """Return which pairs take part in the softmaxes, as bools of the shape of ``mask``."""
    return mask if mask.dtype == torch.bool else ~mask.isneginf()


def output(rows: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``P V [B, H, Nq, dv]`` in float64, in which a masked key takes no part even where its value is NaN or inf.

    Where a value that is not finite does take part, the output is NaN.
    """
    v = v.double()
    if mask is None:
        return rows @ v
    finite = v.isfinite()
    spoiled = takes_part(mask).to(v).expand(rows.shape) @ (~finite).to(v) > 0  # [B, H, Nq, dv]
    return (rows @ v.masked_fill(~finite, 0.0)).masked_fill(spoiled, float("nan"))


def _softmax(s: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the softmax along ``dim`` in which a fully masked slice is all zeros, and its log-sum-exp (-inf there)."""
    lse = torch.logsumexp(s, dim, keepdim=True)
    p = torch.where(lse.isneginf(), 0.0, torch.exp(s - lse.masked_fill(lse.isneginf(), 0.0)))
    return p, lse.squeeze(dim)


class Probabilities(NamedTuple):
    """Both softmaxes of one call, materialised: ``rows`` over all keys, ``columns`` over the generated queries."""

    rows: Tensor  # [B, H, Nq, Nk]
    columns: Tensor  # [B, H, Q, K]
    row_lse: Tensor  # [B, H, Nq]
    col_lse: Tensor  # [B, H, K]


def probabilities(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    queries: slice | Tensor = slice(None),
    keys: slice | Tensor = slice(None),
) -> Probabilities:
    """Return row and column probabilities of ``q [B, H, Nq, d]`` and ``k [B, H, Nk, d]`` in float64."""
    s = logits(q, k, scale, mask)
    rows, row_lse = _softmax(s, -1)
    columns, col_lse = _softmax(s[:, :, queries][..., keys], -2)
    return Probabilities(rows, columns, row_lse, col_lse)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    queries: slice | Tensor = slice(None),
    keys: slice | Tensor = slice(None),
) -> AttentionOutput:
    """Compute attention and its attribution by definition, every field in float64.

    ``mask`` broadcasts to ``[B, H, Nq, Nk]``: bool (True = take part) or additive.
    """
    p = probabilities(q, k, scale=scale, mask=mask, queries=queries, keys=keys)
    spent = p.rows[:, :, queries][..., keys]  # [B, H, Q, K]
    return AttentionOutput(
        out=output(p.rows, v, mask),
        r2g=p.columns.mean(-1),
        g2r=spent.mean(-2),
        mass=None if spent.shape[-1] == k.shape[-2] else spent.sum(-1),
        row_lse=p.row_lse,
        col_lse=p.col_lse,
    )


def sram(rows: Tensor, weights: Tensor) -> Tensor:
    """Return SRAM of regions: ``sum_i w[i] P[i, :] / sum_i w[i]``.

    Args:
        rows: ``[B, H, Q, K]`` row probabilities of the generated queries on the reference keys.
        weights: ``[R, Q]`` or ``[B, R, Q]`` non-negative region weights over the generated tokens.

    Returns: ``[B, H, R, K]``.
    """
    w = weights.to(rows)
    w = w / w.sum(-1, keepdim=True)
    return torch.einsum("brq,bhqk->bhrk", w.expand(rows.shape[0], -1, -1), rows)
