"""Whoever runs the model and however: a map is right, or there is none and a sentence says why."""

import warnings
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import i2am
from tests.helpers import random_loops as rl

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {"unet": rl.unet(), "joint": rl.joint()}


def start(loop, model, scheduler):
    options = dict(time_groups=loop.time_groups, guidance=loop.option, output=loop.output)
    if loop.clock == "scheduler":
        options["scheduler"] = scheduler
    elif loop.clock == "num_steps":
        options["num_steps"] = loop.steps - loop.start
    if loop.region:
        mask = torch.zeros(4, 4)
        mask[:2, :2] = 1
        options["sram"] = {"corner": mask}
    if loop.record:
        options["record"] = "qk"
    if loop.model == "joint":
        return i2am.patch_transformer(model, **options)
    return i2am.patch_unet(model, reference=i2am.Reference(grid=(4, 4), tokens=rl.REFERENCE), **options)


def check(loop):
    """Return how a loop ended: "right", or the sentence of the refusal. Anything else is an error."""
    model = MODELS[loop.model]
    recorder = rl.Recorder(model, loop)
    with recorder.recording():
        rl.Player(loop, model, recorder).play()
    scheduler, blank = rl.make_scheduler(loop), rl.Recorder(model, loop)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    try:
        with start(loop, model, scheduler) as tracer:
            rl.Player(loop, model, blank, tracer, scheduler).play()
        maps = tracer.maps()
    except ValueError as refusal:
        return str(refusal)
    finally:
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    layers = list(dict.fromkeys(s.layer for s in recorder.seen))
    assert maps.recorded_layers == layers
    for layer in layers:
        want = rl.truth(loop, recorder.seen, layer)
        ran = [i for i, x in enumerate(want["g2r"]) if x is not None]
        counts = [sum(s.layer == layer and s.label.group == g for s in recorder.seen) for g in range(loop.time_groups)]
        assert maps.counts()[layer] == counts, (layer, maps.counts()[layer], counts)
        same(maps.tlam("r2g", layers=layer), want["r2g"], ran)
        same(maps.tlam("g2r", layers=layer).flatten(2), want["g2r"], ran)
        if loop.region:
            same(maps.sram("corner", level="time", layers=layer).flatten(2), want["part"], ran)
        if loop.record:
            corner = torch.zeros(4, 4)
            corner[:2, :2] = 1
            same(maps.sram(corner, level="time", layers=layer).flatten(2), want["part"], ran)
    return "right"


def same(got, want, groups):
    want = torch.stack([want[g] for g in groups], 1)
    got = got[:, groups].double()
    assert got.shape == want.shape, (got.shape, want.shape)
    off = float((got - want).abs().max() / want.abs().max())
    assert off <= 2e-5, f"off by {off:.1e} of the peak"


def draw(model, count, **options):
    """Check many loops; return how many ended in which way."""
    ends = Counter()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(rl.loops(model))
    def one(loop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = check(loop)
        assert end == "right" or len(end.split()) > 8, end
        ends[end[:60]] += 1

    one()
    return ends


@pytest.mark.parametrize("model", MODELS)
def test_loops(model):
    ends = draw(model, 40, derandomize=True)
    assert ends["right"] > 10, ends  # a net that refuses everything catches nothing
    assert sum(ends.values()) - ends["right"] > 5, ends


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_many_loops(model):
    draw(model, 1000)
