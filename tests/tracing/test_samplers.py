"""Samplers of CompVis' kind, which are no schedulers: PLMS evaluates its second timestep twice."""

import copy

import pytest
import torch

import i2am
from i2am.tracing.watch import is_sampler, methods_of
from tests.families.test_modules import SAME, SPATIAL, inputs, seen
from tests.helpers.tiny_models import compvis as networks
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import PerLayerGrid
from tests.helpers.truth import assert_peak

GROUPS = [0, 0, 0, 1, 1]  # four steps, the first of two evaluations


def denoiser(model, given, calls):
    """Return ``noise(x, t)`` with guidance: in one batch, or in two calls, the conditional one first."""
    garment, text = given["garment"], given["text"].chunk(2)
    controls = [model.control_model(x) for x in (torch.zeros_like(garment), garment)]

    def one(x, t, parts):
        latents = torch.cat([torch.cat([x, given["agnostic"]], dim=1)] * len(parts))
        control = [torch.cat(level) for level in zip(*(controls[p] for p in parts), strict=True)]
        return model.model(latents, t.repeat(len(parts)), torch.cat([text[p] for p in parts]), control)

    def noise(x, t):
        if calls == 1:
            uncond, cond = one(x, t, (0, 1)).chunk(2)
        else:
            cond, uncond = one(x, t, (1,)), one(x, t, (0,))
        return uncond + 3 * (cond - uncond)

    return noise


@pytest.mark.parametrize("calls", [1, 2])
@torch.no_grad()
def test_plms(calls):
    model, given, sampler = networks.TryOnModel(), inputs(), networks.PLMSSampler()
    noise = denoiser(model, given, calls)

    def go():
        return sampler.sample(noise, given["latents"])

    every = seen(model, go, batch=4 // calls)
    mine = [c for c in every if calls == 1 or c.evaluation % 2 == 0]
    for c in mine:
        c.evaluation //= calls
    truth = PerLayerGrid(mine, samples=slice(2, 4) if calls == 1 else slice(None), groups=GROUPS)
    plain, own = go(), networks.PLMSSampler.p_sample_plms
    line = dict(layers=SPATIAL, reference=SAME, time_groups=2, record="qk")
    guidance = "auto" if calls == 1 else (0, 1)  # two pictures a call
    with i2am.patch_modules(model.model, scheduler=sampler, guidance=guidance, **line) as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.provenance["steps"] == 4
    for direction in ("r2g", "g2r"):
        assert_peak(maps.tlam(direction), truth.tlam(direction, 2))
    assert networks.PLMSSampler.p_sample_plms is own
    with i2am.patch_modules(model.model, num_steps=4, guidance=guidance, layers=SPATIAL, reference=SAME):
        with pytest.raises(ValueError, match=r"scheduler= .* a solver evaluates a step twice"):
            go()


def test_a_sampler_of_another_run():
    model, given = networks.TryOnModel(), inputs()
    noise, watched = denoiser(model, given, 1), networks.PLMSSampler()
    lines = dict(layers=SPATIAL, reference=SAME, scheduler=watched)
    with i2am.patch_modules(model.model, **lines), pytest.raises(ValueError, match="has no schedule yet"):
        networks.PLMSSampler().sample(noise, given["latents"])
    watched.make_schedule(5)
    with i2am.patch_modules(model.model, **lines), pytest.raises(ValueError, match="stands at 801 after 0 steps"):
        copy.copy(watched).sample(noise, given["latents"])


def test_what_is_neither():
    assert not is_sampler(pipelines.ddim())
    assert methods_of(networks.PLMSSampler()) == {"p_sample_plms": ("x", 0), "make_schedule": None}
    with pytest.raises(ValueError, match="got object, which has no step and set_timesteps"):
        i2am.patch_unet(pipelines.unet(), reference=i2am.Reference(), scheduler=object())
