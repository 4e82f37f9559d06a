"""PyTorch's own flash attention for CPUs, carrying more columns than the values: own-side read-outs at its speed.

Whatever is linear in the rows of P rides along: ``P [v, x, …]`` is one call on wider values. Its backward computes
``dS = P ∘ (dO Vᵀ − Σ dO O)``; called with ``[left, 1]`` for the gradient, ``[right, 0]`` for the values and
``[0, …, 0, delta]`` for the output it computes ``dS = P ∘ (left rightᵀ − delta)``, whatever left and right are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16  # float32 lanes of a vector register: widths between cost as much as the next multiple
AVAILABLE = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


def takes(q: Tensor, width: int, mask: Tensor | None, pays: bool = False) -> bool:
    """Return whether columns of ``width`` go through it: float32 or float64 on a CPU, no mask, not far wider than q.

    It has one width for q, k and the values, so columns far wider than q would waste the products; where it ``pays``,
    they are no wider than what q is filled up to.
    """
    exact = q.dtype in (torch.float32, torch.float64)  # in half precision its outputs would be rounded
    most = _width(q, 0) if pays else 2 * q.shape[-1] + LANES
    return AVAILABLE and q.is_cpu and exact and mask is None and width <= most


def attend(q: Tensor, k: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``softmax(scale q kᵀ) values [B, H, Nq, w]`` and the rows' natural log-sum-exp ``[B, H, Nq]``."""
    width = _width(q, values.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _padded(q, width), _padded(k, width), _padded(values, width), 0.0, False, attn_mask=None, scale=scale
    )
    return out[..., : values.shape[-1]], lse


def backward(
    q: Tensor, k: Tensor, lse: Tensor, left: Tensor, right: Tensor, delta: Tensor, *, scale: float, outputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``dq``, ``dk`` and ``dv``: see :func:`i2am.ops.sweeps.backward`."""
    d, w = q.shape[-1], left.shape[-1]
    width = _width(q, w + 1)
    gradient = left.new_zeros(*left.shape[:-1], width)  # [B, H, Nq, width]
    gradient[..., :w] = left
    gradient[..., w] = 1
    out = torch.zeros_like(gradient)
    out[..., w] = delta
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient,
        _padded(q, width),
        _padded(k, width),
        _padded(right, width),
        out,
        lse,
        0.0,
        False,
        attn_mask=None,
        scale=scale,
    )
    return dq[..., :d], dk[..., :d], dv[..., :outputs]


def _width(q: Tensor, width: int) -> int:
    width = max(q.shape[-1], width)
    return width + -width % LANES


def _padded(x: Tensor, width: int) -> Tensor:
    """Return ``x [B, H, N, w]``, tokens before heads in memory, filled up with zeros to ``width``."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
