"""A traced model is copied, pickled, interrupted, traced anew, run under two modes: nothing acts that should not."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F

import i2am
from tests.helpers.tiny_models import unet as pipelines

REFERENCE = i2am.Reference(grid=(2, 3))
SDPA = F.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def unet():
    return pipelines.unet()


def forward(model, scale=1.0, t=3):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x, context = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 6, pipelines.CONTEXT, generator=g)
        return model(scale * x, t, context).sample


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_carries_nothing_that_acts(unet, twin):
    plain = forward(unet)
    tracer = i2am.patch_unet(unet, reference=REFERENCE, time_groups=1)
    forward(unet)
    before = tracer.maps()
    other = twin(unet)
    assert forward(other).equal(plain)
    assert tracer.maps().counts() == before.counts()
    assert tracer.maps().ulam("r2g").equal(before.ulam("r2g"))
    with i2am.patch_unet(other, reference=REFERENCE, time_groups=1) as second:
        forward(other)
    assert set(map(tuple, second.maps().counts().values())) == {(1,)}
    assert hooks(other) == 0  # what it inherited went with the first tracer of its own
    assert tracer.maps().counts() == before.counts()
    tracer.unpatch()
    assert hooks(unet) == 0


def test_a_cell_run_twice_just_works(unet, caplog):
    tracer = i2am.patch_unet(unet, reference=REFERENCE)
    forward(unet)
    tracer = i2am.patch_unet(unet, reference=REFERENCE)
    assert "this one takes over" in caplog.text
    forward(unet)
    assert sum(next(iter(tracer.maps().counts().values()))) == 1
    tracer.unpatch()
    assert hooks(unet) == 0


def test_unpatch_by_model_and_by_pipeline(unet):
    i2am.patch_unet(unet, reference=REFERENCE)
    assert i2am.unpatch(unet)
    assert not i2am.unpatch(unet)
    assert hooks(unet) == 0
    pipe = pipelines.sd("full")
    i2am.trace(pipe)
    assert i2am.unpatch(pipe)
    assert hooks(pipe.unet) == 0
    i2am.trace(pipe).unpatch()


def test_one_call_under_inference_mode_and_one_without(unet):
    with i2am.patch_unet(
        unet, reference=REFERENCE, time_groups=1, sram={"eye": (2, 2)}, record="qk", num_steps=2
    ) as tracer:
        with torch.inference_mode():
            forward(unet, t=900)
        forward(unet, t=100)
    assert set(map(tuple, tracer.maps().counts().values())) == {(2,)}
    assert tracer.maps().sram("eye").isfinite().all()


def interrupted(n, run):
    """Raise KeyboardInterrupt at the n-th call or C return inside i2am while ``run()`` runs; return where."""
    count, where = 0, None

    def profile(frame, event, arg):
        nonlocal count, where
        inside = "/i2am/" in frame.f_code.co_filename or frame.f_code.co_name.startswith("register_forward")
        if where is None and inside and event in ("call", "c_return"):
            count += 1
            if count == n:
                where = f"{frame.f_code.co_name} ({event})"
                sys.setprofile(None)
                raise KeyboardInterrupt

    tracer = None
    sys.setprofile(profile)
    try:
        tracer = run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    if tracer is not None:
        tracer.unpatch()
    return where


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_while_tracing_begins_leaves_nothing(unet, monkeypatch, step):
    monkeypatch.setattr(sys, "unraisablehook", lambda *_: None)  # an interrupt in a generator that is being closed
    start = lambda: i2am.patch_unet(unet, reference=REFERENCE, num_steps=1)  # noqa: E731
    start().unpatch()
    n, seen = 1, 0
    while where := interrupted(n, start):
        assert hooks(unet) == 0, where
        start().unpatch()
        n, seen = n + step, seen + 1
    assert seen > 20


def void(_):
    return None


def test_an_interrupt_in_a_traced_forward_leaves_nothing(unet):
    forward(unet)
    tracer = i2am.patch_unet(unet, reference=REFERENCE, time_groups=1)
    for n in range(1, 4000, 97):
        if interrupted(n, lambda: void(forward(unet))) is None:
            break
        assert F.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 8)).shape == (1, 1, 4, 8)
        forward(pipelines.unet(seed=3))
    tracer.reset()
    forward(unet)
    assert set(map(tuple, tracer.maps().counts().values())) == {(1,)}
    tracer.unpatch()
    assert F.scaled_dot_product_attention is SDPA


def test_provenance_says_what_the_maps_are_a_mean_of():
    pipe = pipelines.sd("full")
    with i2am.trace(pipe, time_groups=2) as tracer:
        pipe(
            "a",
            ip_adapter_image=pipelines.image((40, 40)),
            num_inference_steps=4,
            height=32,
            width=32,
            output_type="latent",
        )
    told = tracer.maps().provenance
    assert (told["model"], told["pipeline"]) == ("UNet2DConditionModel", "StableDiffusionPipeline")
    assert told["calls"] == {"seen": 4, "counted": 4, "passed_by": {}}
    assert (told["runs"], told["steps"]) == (1, 4)
    assert told["guidance"] == {"StableDiffusionPipeline: part 1 of 2": 4}
    assert told["references"] == {"ip_adapter": "all 17"}
    assert set(map(tuple, told["layers"].values())) == {(2, 2)}
    assert "torch" in told["versions"]
    assert "mean of 4 of 4 calls of UNet2DConditionModel, StableDiffusionPipeline: 1 run of 4 steps" in repr(
        tracer.maps()
    )
    assert "known by StableDiffusionPipeline: part 1 of 2" in repr(tracer.maps())


def test_a_run_that_ended_early_is_told():
    pipe = pipelines.sd("full")

    def run(steps, callback=None):
        picture, size = pipelines.image((40, 40)), dict(height=32, width=32, output_type="latent")
        pipe("a", ip_adapter_image=picture, num_inference_steps=steps, callback_on_step_end=callback, **size)

    def failing(pipe, step, timestep, values):
        if step == 1:
            raise RuntimeError("the disk is full")
        return values

    with i2am.trace(pipe) as tracer:
        with pytest.raises(RuntimeError, match="disk"):
            run(3, failing)
        assert "1 of 1 runs ended early, after 2 of 3 steps" in repr(tracer.maps())
        assert any("or the last is not over" in note for note in tracer.maps().provenance["notes"])
        run(3)
        assert "5 of 5 calls of UNet2DConditionModel, StableDiffusionPipeline: 2 runs of 3 steps" in repr(tracer.maps())
        assert "1 of 2 runs ended early, after 2 of 3 steps: what they had computed counts" in repr(tracer.maps())
        tracer.reset()
        run(2)
        run(4)
    assert "2 runs of 2 to 4 steps" in repr(tracer.maps())
    assert not any("early" in note for note in tracer.maps().provenance["notes"])


def test_a_time_group_in_which_nothing_ran_is_told():
    pipe = pipelines.sd("full")

    def off(pipe, step, timestep, values):
        if step == 1:
            pipe.set_ip_adapter_scale(0.0)  # diffusers skips its attention from here on
        return values

    with i2am.trace(pipe, time_groups=2) as tracer:
        pipe(
            "a",
            ip_adapter_image=pipelines.image((40, 40)),
            num_inference_steps=4,
            height=32,
            width=32,
            output_type="latent",
            callback_on_step_end=off,
        )
    maps = tracer.maps()
    over_time = maps.tlam("r2g")
    assert over_time[:, 1].isnan().all()
    torch.testing.assert_close(over_time[:, 0], maps.ulam("r2g"))
    assert "no layer ran in time group 2 of 2" in repr(maps)
    assert any("no layer ran in time group 2 of 2" in note for note in maps.provenance["notes"])
