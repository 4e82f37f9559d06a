"""A diffusion transformer as code outside diffusers writes them: fused projections, norms and rotary embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 32, 2


def split(x: Tensor) -> tuple[Tensor, ...]:
    """``[B, N, 3·H·d]`` → three times ``[B, H, N, d]``."""
    return tuple(x.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding over the sequence."""
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def flash(q, k, v):
    import flash_attn

    return flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=False).transpose(1, 2)


def einsum(q, k, v):
    return (torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1) @ v


class DoubleBlock(nn.Module):
    """Text and image with weights of their own; one attention over both."""

    def __init__(self, attention, extra: bool):
        super().__init__()
        self.img_qkv, self.txt_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        self.img_proj, self.txt_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention, self.extra = attention, extra

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        text = txt.shape[1]
        q, k, v = (torch.cat(x, dim=2) for x in zip(split(self.txt_qkv(txt)), split(self.img_qkv(img)), strict=True))
        q, k = rotate(self.norm_q(q)), rotate(self.norm_k(k))
        if self.extra:  # a call before the one that is meant
            txt = txt + self.attention(*(x[:, :, :text] for x in (q, k, v))).transpose(1, 2).flatten(2)
        out = self.attention(q, k, v).transpose(1, 2).flatten(2)
        return img + self.img_proj(out[:, text:]), txt + self.txt_proj(out[:, :text])


class SingleBlock(nn.Module):
    """Projections and feed-forward in one matrix."""

    def __init__(self, attention):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = self.linear1(x).split([3 * WIDTH, WIDTH], dim=-1)
        q, k, v = split(qkv)
        out = self.attention(rotate(q), rotate(k), v).transpose(1, 2).flatten(2)
        return x + self.linear2(torch.cat([out, F.gelu(mlp)], dim=-1))


class FusedTransformer(nn.Module):
    """``[text ‖ generated ‖ reference]``; called as the original Flux is."""

    def __init__(self, attention=sdpa, extra: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.img_in, self.txt_in = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)
        self.double_blocks = nn.ModuleList(DoubleBlock(attention, extra) for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock(attention) for _ in range(1))
        self.final = nn.Linear(WIDTH, 8)

    def forward(self, img: Tensor, txt: Tensor, timesteps: Tensor) -> Tensor:
        img, txt = self.img_in(img) + timesteps[:, None, None], self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x)
        return self.final(x[:, txt.shape[1] :])
