"""Eager attention that keeps the whole ``[B, H, Nq, Nk]``: the manner of every attention-map tool, written afresh."""

from __future__ import annotations

from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(out [B, H, Nq, d], r2g [B, H, Nq], g2r [B, H, Nk])``."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, Nq, Nk]
    rows = s.softmax(-1)
    return rows @ v, s.softmax(-2).mean(-1), rows.mean(-2)
