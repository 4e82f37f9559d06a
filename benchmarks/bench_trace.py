"""Model level: one step of a full-size SD 1.5 UNet, untraced, traced, and traced in the authors' manner.

Weights are random (time does not depend on them), one image, 64×64 latents, float32 on CPU. Each provider's steps are
timed in turn with the untraced one's, and the table holds the median of these ratios; memory is what the resident set
grows beyond an untraced step's.
"""

import time
from contextlib import nullcontext
from statistics import median

import pytest
import torch
from memory import Memory
from peers.hook import HookTracer

import i2am

ROUNDS = 5
CONTEXTS = {257: i2am.Reference(grid=(16, 16), skip=1), 3072: i2am.Reference(grid=(64, 48))}


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()


def providers(unet, tokens):
    return {
        "untraced": nullcontext,
        "i2am": lambda: i2am.patch_unet(unet, reference=CONTEXTS[tokens]),
        "i2am output=model": lambda: i2am.patch_unet(unet, reference=CONTEXTS[tokens], output="model"),
        "hook": lambda: HookTracer(unet, keep=1),
    }


def verify(unet, tokens, inputs):
    """A wrong answer is not timed: the hook's maps and ours agree, layer by layer."""
    with HookTracer(unet, keep=1) as hook:
        unet(**inputs)
    with i2am.patch_unet(unet, reference=CONTEXTS[tokens], output="model") as tracer:
        unet(**inputs)
    maps = tracer.maps()
    for layer in maps.recorded_layers:
        h, w = maps.grids()[layer]
        for direction, theirs in (("r2g", hook.r2g), ("g2r", hook.g2r)):
            ours = maps.ulam(direction, layers=layer)
            want = theirs[layer][0].mean(1)
            want = want.unflatten(1, (h, w)) if direction == "r2g" else want[:, -ours[0].numel() :].view_as(ours)
            assert (ours - want).abs().max() <= 2e-5 * want.abs().max(), (layer, direction)


@pytest.mark.parametrize("tokens", CONTEXTS)
@torch.no_grad()
def test_full_size_unet_step(benchmark, unet, tokens, capsys):
    inputs = dict(sample=torch.randn(1, 4, 64, 64), timestep=500, encoder_hidden_states=torch.randn(1, tokens, 768))
    verify(unet, tokens, inputs)
    times, memory = {}, {}
    for name, provider in providers(unet, tokens).items():
        with provider(), Memory() as m:
            unet(**inputs)
        memory[name] = m.peak
    for _ in range(ROUNDS):
        for name, provider in providers(unet, tokens).items():
            with provider():
                start = time.perf_counter()
                unet(**inputs)
                times.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {n: median(t / u for t, u in zip(times[n], times["untraced"], strict=True)) for n in times}
    extra = {n: memory[n] - memory["untraced"] for n in memory}
    benchmark.extra_info.update(ratio_to_untraced=ratios, extra_bytes=extra)
    with capsys.disabled():
        print(
            f"\nSD 1.5 UNet step, 64×64 latent, {tokens} reference tokens: untraced {median(times['untraced']):.2f} s"
        )
        for name in times:
            print(f"  {name:20s} {ratios[name]:5.2f} × untraced   {extra[name] / 1e6:+8.0f} MB")
    with i2am.patch_unet(unet, reference=CONTEXTS[tokens]):
        benchmark.pedantic(lambda: unet(**inputs), rounds=1)
