"""A stand-in for what ComfyUI promises its custom nodes: patchers, wrappers, attention overrides, tiny models."""

from __future__ import annotations

import copy
import sys
import types
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

HEADS, WIDTH, TEXT, STEPS = 2, 32, 5, 3


def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, transformer_options=None, **kw):
    """ComfyUI's ``optimized_attention``: an override in the options is asked, once."""
    if "_inside" not in kw and "optimized_attention_override" in (transformer_options or {}):
        override = transformer_options["optimized_attention_override"]
        given = {"skip_reshape": skip_reshape, "transformer_options": transformer_options, "_inside": True}
        return override(attention, q, k, v, heads, mask=mask, **kw, **given)
    q, k, v = (x if skip_reshape else x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kw.get("scale")).transpose(1, 2).flatten(2)


class Executor:
    """ComfyUI's ``WrapperExecutor`` around a model's forward."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args, **kwargs):
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        following = Executor(self.original, self.class_obj, self.wrappers[1:])
        return following.execute(*args, **kwargs) if following.wrappers else self.original(*args, **kwargs)


def wrapped(model, *args, **kwargs):
    options = kwargs.get("transformer_options") or next(x for x in args if isinstance(x, dict) and "sigmas" in x)
    found = [w for of in options.get("wrappers", {}).get("diffusion_model", {}).values() for w in of]
    return Executor(model._forward, model, found).execute(*args, **kwargs)


class Flux(nn.Module):
    """A transformer of double and single blocks over ``[text ‖ generated ‖ references]``."""

    patch_size = 2

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.options = options  # of its attention
        self.inside, self.outside = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))

    def forward(self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
                transformer_options=None, **kwargs):  # fmt: skip
        return wrapped(self, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
                 transformer_options=None, **kwargs):  # fmt: skip
        pictures = [self.inside(F.pixel_unshuffle(p, 2).flatten(2).transpose(1, 2)) for p in (x, *(ref_latents or ()))]
        h = torch.cat([context, *pictures], 1)
        for i, block in enumerate(self.blocks):
            transformer_options["block_type"] = "double" if i < 2 else "single"
            transformer_options["block_index"] = i % 2
            q, k, v = (
                part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in block(h * (1 + timestep[:, None, None])).chunk(3, -1)
            )
            h = h + attention(
                q, k, v, HEADS, mask=kwargs.get("attention_mask"), skip_reshape=True,
                transformer_options=transformer_options, **self.options,
            )  # fmt: skip
        own = self.outside(h[:, TEXT : TEXT + pictures[0].shape[1]])
        return F.pixel_shuffle(own.transpose(1, 2).unflatten(2, (x.shape[-2] // 2, x.shape[-1] // 2)), 2)


class UNetModel(nn.Module):
    """A UNet of three cross-attentions on two resolutions, whose ``attn2`` may be replaced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Conv2d(4, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.projections = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) for _ in range(3))

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        return wrapped(self, x, timesteps, context, y, control, transformer_options, **kwargs)

    def _forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        transformer_options["original_shape"] = list(x.shape)
        h = self.inside(x) + timesteps[:, None, None, None]
        for i, block in enumerate([("input", 1), ("middle", 0), ("output", 3)]):
            h = F.avg_pool2d(h, 2) if block[0] == "middle" else h
            h = F.interpolate(h, scale_factor=2.0) if block[0] == "output" else h
            transformer_options |= {"block": block, "block_index": 0, "activations_shape": list(h.shape)}
            q, k, v = (to(part) for to, part in zip(self.projections[i], (_tokens(h), context, context), strict=True))
            patch = transformer_options.get("patches_replace", {}).get("attn2", {}).get(block)
            if patch is None:
                out = attention(q, k, v, HEADS, transformer_options=transformer_options)
            else:
                out = patch(q, k, v, {**transformer_options, "n_heads": HEADS})
            h = h + out.transpose(1, 2).unflatten(2, h.shape[-2:])
        return self.outside(h)


def _tokens(x):
    return x.flatten(2).transpose(1, 2)


def adapter_module(monkeypatch):
    """A module with IPAdapter_plus's patch class, which calls attention by the name in its own module."""
    module = types.ModuleType("stand_in_for_ipadapter_plus")
    module.optimized_attention = attention
    source = """
class Attn2Replace:
    def __init__(self, callback, **kwargs):
        self.callback, self.kwargs = [callback], [kwargs]

    def add(self, callback, **kwargs):
        self.callback.append(callback)
        self.kwargs.append(kwargs)

    def __call__(self, q, k, v, extra_options):
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        for callback, kwargs in zip(self.callback, self.kwargs):
            out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out

def ipadapter_attention(out, q, k, v, extra_options, cond, uncond, weight=1.0, log=None):
    if weight == 0:
        return 0
    parts, images = extra_options["cond_or_uncond"], q.shape[0] // len(extra_options["cond_or_uncond"])
    ip = torch.cat([(cond, uncond)[i].repeat(images, 1, 1) for i in parts])
    if log is not None:
        log.append((extra_options["block"], parts, q, ip))
    return weight * optimized_attention(q, ip, ip, extra_options["n_heads"])
"""
    module.torch = torch
    exec(source, vars(module))  # its functions look names up in the module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class Patcher:
    """ComfyUI's ``ModelPatcher``."""

    def __init__(self, model):
        self.model, self.model_options, self.wrappers = model, {"transformer_options": {}}, {}

    def clone(self):
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in of.items()} for kind, of in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)


@torch.no_grad()
def sample(patcher, x, positive, negative, steps=STEPS, apart=False, **both):
    """Sample with guidance, as KSampler runs it: [negative, positive] in one batch, or one call each (``apart``)."""
    sigmas = torch.cat([torch.linspace(1, 0.2, steps), torch.zeros(1)])
    for sigma, following in pairwise(sigmas):
        calls = [[0], [1]] if apart else [[1, 0]]
        found = {}
        for parts in calls:
            options = copy.copy(patcher.model_options["transformer_options"]) | {
                "cond_or_uncond": parts,
                "uuids": ["cond" if part == 0 else "uncond" for part in parts],
                "sigmas": sigma.expand(len(parts) * len(x)),
                "sample_sigmas": sigmas,
                "wrappers": patcher.wrappers,
            }
            context = torch.cat([(positive, negative)[part].expand(len(x), -1, -1) for part in parts])
            given = {name: [r.repeat(len(parts), *[1] * (r.ndim - 1)) for r in value] for name, value in both.items()}
            latents = x.repeat(len(parts), *[1] * (x.ndim - 1))
            out = patcher.model(latents, options["sigmas"], context=context, transformer_options=options, **given)
            found |= dict(zip(parts, out.chunk(len(parts)), strict=True))
        noise = found[1] + 3 * (found[0] - found[1])
        x = x + (following - sigma) * noise
    return x
