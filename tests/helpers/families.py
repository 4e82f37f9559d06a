"""What every family's test is made of: run a small pipeline plainly, then traced, and compare its maps with the truth.

A test of a family, ``tests/families/test_<its file>.py``, says four things: how its pipeline is built and called, which
modules attend (:func:`tests.helpers.tokens.capture_calls`), which of their queries are the generated tokens, and which
keys are a reference's, on which grid. ::

    @support.family("name", "its pipelines", "where the reference is among the keys")  # a row of docs/support.md
    def test_it():
        pipe = build()
        go = run(pipe, image=..., width=24, height=16)
        calls = capture_calls(pipe.transformer, go, ("ItsAttention",))
        maps = traced(pipe, go)
        chosen = generated(calls, (4, 6), slice(5, 29))  # 4×6 generated tokens behind 5 of text
        check_parts(maps, {"reference": (slice(29, 61), (4, 8))}, chosen, groups=[0, 0, 1, 1])
"""

import torch

import i2am
from tests.helpers.truth import Truth, assert_peak
from tests.support_table import asked, check, note

GUIDED = slice(1, 2)  # [uncond, cond] of one image
PROMPT = {"prompt": "a b"}


def generator():
    return torch.Generator().manual_seed(7)


def run(pipe, **kwargs):
    """Return a function that makes one picture in four steps, always the same."""
    common = dict(num_inference_steps=4, output_type="np")
    return lambda: pipe(generator=generator(), **(common | kwargs)).images


def run_at(pipe, steps=4, size=(32, 32), **kwargs):
    """Return a function that makes one picture of ``size``, (width, height)."""
    return run(pipe, num_inference_steps=steps, width=size[0], height=size[1], **kwargs)


def denoise(unet, scheduler, context, latents, steps=4, guidance=3.0):
    """Run a hand-written loop with batched guidance; return the final latents."""
    scheduler.set_timesteps(steps)
    x = latents.clone()
    for t in scheduler.timesteps:
        with torch.no_grad():
            uncond, cond = unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks")
    return {(n, h): len(getattr(m, h)) for n, m in model.named_modules() for h in names}


def traced(pipe, go, *, strip=1, **options):
    """Return the maps of ``go()``; assert that tracing changes no picture and leaves nothing behind.

    Args:
        strip: how many pictures the maps show below each other (latent frames of a video).
        options: of :func:`i2am.trace`.
    """
    record = {} if options.get("rollout") else {"record": "qk"}
    model = getattr(pipe, "transformer", None) or pipe.unet
    before, plain = hooks(model), go()
    with i2am.trace(pipe, time_groups=2, output="model", **(record | options)) as tracer:
        got = go()
    assert (got == plain).all()
    assert hooks(model) == before
    assert (go() == plain).all()
    with i2am.trace(pipe, time_groups=2, **options) as fused:
        close = go()
    assert abs(close - plain).max() < 1e-3
    maps = tracer.maps()
    assert maps.canvas == (strip * plain.shape[-3], plain.shape[-2])  # pixels of the picture
    for direction in ("r2g", "g2r"):
        for name in maps.references:
            a, b = (drawn(m, direction, name) for m in (maps, fused.maps()))
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    return maps


def drawn(maps, direction, name):
    """Return the unified map, or how many letters the reason has why there is none."""
    try:
        return maps.ulam(direction, reference=name)
    except ValueError as error:
        return len(str(error))


def check_parts(maps, parts, chosen, *, groups, samples=slice(None)):
    """Compare all maps with the truth, of every reference: name → (its keys, its grid)."""
    assert maps.references == list(parts)
    for name, (keys, grid) in parts.items():
        truth = Truth(chosen, samples=samples, keys=keys, groups=groups, reference_grid=grid)
        check(maps, truth, 2, reference=name)


def check_levels(maps, truth, T, reference=None, directions=("r2g", "g2r")):
    """Compare all levels with the truth; those of heads where all layers have as many."""
    asked(maps, truth, directions, reference=reference)
    for direction in directions:
        assert_peak(maps.ulam(direction, reference=reference), truth.ulam(direction))
        assert_peak(maps.tlam(direction, reference=reference), truth.tlam(direction, T))
        assert_peak(maps.llam(direction, reference=reference), truth.llam(direction))
        heads = {name: m[0][1]["r2g"].shape[1] for name, m in truth.maps.items()}
        note(direction, "ulam", "tlam", "llam")
        if len(set(heads.values())) == 1:
            assert_peak(maps.hlam(direction, reference=reference), truth.hlam(direction))
            note(direction, "hlam")
