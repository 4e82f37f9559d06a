"""Networks in the manner of the paper's own code bases: CompVis' attention, a second branch, pixel attention.

``Attention`` computes as CompVis' does, in two einsums; ``seen`` keeps what it compared, for the tests.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import Transformer2DModel
from torch import Tensor, einsum, nn


class Attention(nn.Module):
    def __init__(self, width: int, context: int | None = None, heads: int = 2, head_dim: int = 8):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.scale = heads, head_dim**-0.5
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context or width, inner, bias=False)
        self.to_v = nn.Linear(context or width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width), nn.Dropout(0.0))
        self.seen: list | None = None

    def split(self, x: Tensor) -> Tensor:  # [B, N, H·d] → [B·H, N, d]
        B, N, _ = x.shape
        return x.view(B, N, self.heads, -1).transpose(1, 2).reshape(B * self.heads, N, -1)

    def forward(self, x, context=None, mask=None, mask1=None, mask2=None):
        context = x if context is None else context
        q, k, v = (self.split(part) for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        logits = einsum("bid,bjd->bij", q.float(), k.float()) * self.scale
        blocked = None
        if mask is not None:
            blocked = ~mask.flatten(1)[:, None]  # [B, 1, keys]
        if mask1 is not None:
            blocked = (mask1.flatten(1)[:, :, None] * mask2.flatten(1)[:, None]).bool()  # [B, queries, keys]
        if blocked is not None:
            logits = logits.masked_fill(blocked.repeat_interleave(self.heads, 0), -torch.finfo(logits.dtype).max)
        if self.seen is not None:
            self.seen.append((q.clone(), k.clone(), blocked))
        return self.merge(einsum("bij,bjd->bid", logits.softmax(-1), v), x.shape[0])

    def merge(self, out: Tensor, batch: int) -> Tensor:
        return self.to_out(out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2))


class EfficientAttention(Attention):
    """The same through ``xformers.ops``."""

    def forward(self, x, context=None, mask=None):
        import xformers.ops

        context = x if context is None else context
        q, k, v = (self.split(part) for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        if self.seen is not None:
            self.seen.append((q.clone(), k.clone(), None))
        out = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=None, op=None)
        return self.merge(out, x.shape[0])


def stand_in_for_xformers() -> dict[str, types.ModuleType]:
    """Modules with the interface of xformers' attention: ``[B, N, H, d]`` or ``[B·H, N, d]``."""

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        if query.ndim == 3:
            return F.scaled_dot_product_attention(query, key, value, attn_bias, p, scale=scale)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_bias, p, scale=scale).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    return {"xformers": package, "xformers.ops": ops}


class Spatial(nn.Module):
    """Self- and cross-attention over a feature map."""

    def __init__(self, width: int, context: int, kind: type[Attention] = Attention, heads: int = 2):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.attn1 = kind(width, heads=heads)
        self.attn2 = kind(width, context, heads=heads)

    def forward(self, x: Tensor, context: Tensor, **masks) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attn1(tokens)
        tokens = tokens + self.attn2(tokens, context, **masks)
        return x + tokens.transpose(1, 2).reshape(B, C, H, W)


class Branch(nn.Module):
    """An encoder of three resolutions, as ControlNet copies it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.conv_in(x)]
        for conv in self.down:
            features.append(conv(F.silu(features[-1])))
        return features


class TryOn(nn.Module):
    """StableVITON's shape: the garment's features at three resolutions are the keys of zero cross-attention blocks."""

    def __init__(self, kind: type[Attention] = Attention, width: int = 16, text: int = 12):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Branch(9, width)
        self.time = nn.Linear(1, width)
        self.texts = nn.ModuleList(Spatial(width, text, kind) for _ in range(3))
        self.warp_zero_crossattn_blks = nn.ModuleList(Spatial(width, width, kind, heads=4) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x, timesteps=None, context=None, control=None, **masks):
        features = self.encoder(x)
        features[0] = features[0] + self.time(timesteps.float()[:, None] / 1000)[:, :, None, None]
        h = features[-1]
        for level in (2, 1, 0):
            h = self.texts[level](h, context)
            garment = control[level].flatten(2).transpose(1, 2)
            h = self.warp_zero_crossattn_blks[level](h, garment, **masks)
            if level:
                h = self.up[level - 1](F.interpolate(h, features[level - 1].shape[-2:])) + features[level - 1]
        return self.conv_out(h)


class TryOnModel(nn.Module):
    """Both branches, and a sampler with batched guidance."""

    def __init__(self, kind: type[Attention] = Attention):
        super().__init__()
        self.model = TryOn(kind).eval()
        self.control_model = Branch(4, 16).eval()

    @torch.no_grad()
    def sample(self, latents, agnostic, garment, text, scheduler, steps=4, guidance=3.0, **masks):
        """``latents [B, 4, h, w]``, ``agnostic [B, 5, h, w]``, ``garment [B, 4, h, w]``, ``text [2B, n, 12]``."""
        control = self.control_model(torch.cat([torch.zeros_like(garment), garment]))
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = torch.cat([torch.cat([latents, agnostic], dim=1)] * 2)
            time = t.expand(x.shape[0])
            uncond, cond = self.model(x, time, context=text, control=control, **masks).chunk(2)
            latents = scheduler.step(uncond + guidance * (cond - uncond), t, latents).prev_sample
        return latents


class PLMSSampler:
    """A sampler of CompVis' kind: the first step also evaluates the model at the next timestep."""

    def make_schedule(self, ddim_num_steps):
        self.ddim_timesteps = np.arange(ddim_num_steps) * (1000 // ddim_num_steps) + 1
        self.alphas = torch.linspace(0.9, 0.1, ddim_num_steps)

    @torch.no_grad()
    def sample(self, noise, x, steps=4):
        """``noise(x, t)``: what a model says of latents ``x`` at timesteps ``t``."""
        self.make_schedule(ddim_num_steps=steps)
        times, before = np.flip(self.ddim_timesteps), []
        for i, t in enumerate(times):
            following = times[min(i + 1, steps - 1)]
            x, e = self.p_sample_plms(x, noise, t, index=steps - i - 1, t_next=following, old_eps=before)
            before.append(e)
        return x

    def p_sample_plms(self, x, noise, t, index, t_next, old_eps):
        def step(e):
            return x - (1 - self.alphas[index]) * 0.3 * e

        e = noise(x, self._of(x, t))
        if not old_eps:
            return step((e + noise(step(e), self._of(x, t_next))) / 2), e
        return step((3 * e - old_eps[-1]) / 2), e

    def _of(self, x, t):
        return torch.full((x.shape[0],), int(t))


class PixelAwareUpscaler(nn.Module):
    """PASD's shape: after each up layer a Transformer2DModel attends to features of the low-resolution image."""

    def __init__(self, width: int = 16, control: int = 12, text: int = 8):
        super().__init__()
        torch.manual_seed(0)
        make = lambda context: Transformer2DModel(2, 8, width, cross_attention_dim=context, norm_num_groups=4)  # noqa: E731
        self.encoder = Branch(4, width)
        self.condition = Branch(3, control)
        self.time = nn.Linear(1, width)
        self.attentions = nn.ModuleList(make(text) for _ in range(2))
        self.pixel_attentions = nn.ModuleList(make(control) for _ in range(2))
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, low_resolution):
        features, controls = self.encoder(sample), self.condition(low_resolution)
        h = features[-1] + self.time(torch.as_tensor(timestep).float().view(1, 1) / 1000)[:, :, None, None]
        for level in (1, 0):
            h = F.interpolate(h, features[level].shape[-2:]) + features[level]
            h = self.attentions[level](h, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
            control = controls[level].flatten(2).transpose(1, 2)
            h = self.pixel_attentions[level](h, encoder_hidden_states=control, return_dict=False)[0]
        return self.conv_out(h)


def install(modules: dict[str, types.ModuleType], monkeypatch) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
