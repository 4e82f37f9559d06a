"""DAAM's manner, written afresh: eager attention whose row probabilities are kept as one heat map a key."""

from __future__ import annotations

from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(out [B, H, Nq, d], heat maps [B, Nk, Nq])``: the heads' mean of the row softmax, a map a key."""
    rows = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # [B, H, Nq, Nk]
    return rows @ v, rows.mean(1).transpose(-1, -2).contiguous()
