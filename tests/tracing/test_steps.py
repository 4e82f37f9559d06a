"""``time_groups="steps"``: a group for every denoising step of the run."""

import pytest
import torch

import i2am
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture

REFERENCE = i2am.Reference(grid=(2, 3))


def loop(unet, scheduler, steps):
    def run():
        torch.manual_seed(0)
        latents, context = torch.randn(1, 4, 16, 12), torch.randn(1, 6, pipelines.CONTEXT)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            with torch.no_grad():
                latents = scheduler.step(unet(latents, t, context).sample, t, latents).prev_sample

    return run


@pytest.mark.parametrize("clock", ["scheduler", "num_steps"])
def test_a_group_a_step(clock):
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    run = loop(unet, scheduler, 3)
    truth = Truth(capture(unet, run), groups=[0, 1, 2], reference_grid=(2, 3))
    told = {"scheduler": scheduler} if clock == "scheduler" else {"num_steps": 3}
    with i2am.patch_unet(unet, reference=REFERENCE, time_groups="steps", **told) as tracer:
        run()
        run()
    maps = tracer.maps()
    assert maps.time_groups == 3
    assert set(map(tuple, maps.counts().values())) == {(2, 2, 2)}
    assert maps.one_group_a_step
    assert_peak(maps.tlam("r2g"), truth.tlam("r2g", 3))


def test_a_pipeline_knows_its_steps():
    pipe = pipelines.sd("full")
    with i2am.trace(pipe, time_groups="steps", record="qk", record_times=[0]) as tracer:
        pipe("a", ip_adapter_image=pipelines.image(), num_inference_steps=2, width=16, height=16, output_type="latent")
    maps = tracer.maps()
    assert maps.time_groups == 2
    assert {entry.group for entry in maps._entries} == {0}


def test_runs_of_other_lengths_are_refused():
    unet, scheduler = pipelines.unet(), pipelines.ddim()
    with i2am.patch_unet(unet, reference=REFERENCE, time_groups="steps", scheduler=scheduler) as tracer:
        loop(unet, scheduler, 2)()
        before = tracer.maps().ulam("r2g")
        with pytest.raises(ValueError, match="this run has 3 steps, an earlier one had 2"):
            loop(unet, scheduler, 3)()
        assert tracer.maps().ulam("r2g").equal(before)
        tracer.reset()
        loop(unet, scheduler, 3)()
    assert tracer.maps().time_groups == 3


def test_unknown_steps_are_refused_before_anything():
    unet = pipelines.unet()
    with pytest.raises(ValueError, match=r'time_groups="steps" needs num_steps= or scheduler='):
        i2am.patch_unet(unet, reference=REFERENCE, time_groups="steps")
    assert not unet._forward_pre_hooks
    with pytest.raises(ValueError, match="time_groups must be a positive integer or \"steps\", got 'step'"):
        i2am.patch_unet(unet, reference=REFERENCE, time_groups="step", num_steps=2)
