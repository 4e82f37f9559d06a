"""PyTorch's own attention with its row log-sum-exp: what attribution beside a model's attention starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten
STOCK = torch._C._nn.scaled_dot_product_attention  # what F.scaled_dot_product_attention is, unless somebody replaced it


def forward_with_lse(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor] | None:
    """Run the very kernel that ``scaled_dot_product_attention`` would choose, by the operator that tells more.

    Args:
        q, k, v, attn_mask, scale: as of ``scaled_dot_product_attention``; no autocast, no dropout, not causal.

    Returns:
        ``out [B, H, Nq, dv]``, bit for bit its own, and ``row_lse [B, H, Nq]`` natural, float32. None where the chosen
        kernel does not tell its log-sum-exp (the plain one; a mask on a GPU): then nothing has run.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    choice = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, False, scale=scale)
    if choice == SDPBackend.FLASH_ATTENTION.value and q.device.type == "cpu":
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as scaled_dot_product_attention turns it
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -math.inf)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    elif choice == SDPBackend.FLASH_ATTENTION.value and q.shape[-1] % 8 == 0:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    elif choice == SDPBackend.EFFICIENT_ATTENTION.value and attn_mask is None:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)[:2]
    elif choice == SDPBackend.CUDNN_ATTENTION.value and attn_mask is None:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)[:2]
    else:
        return None
    B, H, Nq, _ = q.shape
    lse = lse.reshape(B, H, -1)[..., :Nq]  # the efficient kernel's is longer, cuDNN's has one more axis
    return out, lse.float()
