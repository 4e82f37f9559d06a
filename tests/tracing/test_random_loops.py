"""Whoever runs the model and however: a map is right, or there is none and a sentence says why."""

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import i2am
from tests.helpers import random_loops as rl

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {"unet": rl.unet(), "joint": rl.joint(), "pipeline": rl.pipeline()}


def start(loop, model, scheduler):
    options = dict(time_groups=loop.time_groups, guidance=loop.option)
    if loop.entry != "modules":  # which leaves the output to the model
        options["output"] = loop.output
    if loop.model == "pipeline":
        pass  # it has its scheduler
    elif loop.clock == "scheduler":
        options["scheduler"] = scheduler
    elif loop.clock == "num_steps":
        options["num_steps"] = loop.steps - loop.start
    if loop.region:
        mask = torch.zeros(4, 4)
        mask[:2, :2] = 1
        options["sram"] = {"corner": mask}
    if loop.record:
        options["record"] = "qk"
    if loop.model == "pipeline":
        return i2am.trace(model, **options)
    if loop.model == "joint":
        return i2am.patch_transformer(model, **options)
    if loop.entry == "modules":
        reference = i2am.Reference(grid=(4, 4), tokens=rl.REFERENCE)
        return i2am.patch_modules(model, layers="*attn2", reference=reference, **options)
    return i2am.patch_unet(model, reference=i2am.Reference(grid=(4, 4), tokens=rl.REFERENCE), **options)


def player(loop, model, recorder, tracer=None, scheduler=None):
    if loop.model == "pipeline":
        return rl.PipelinePlayer(loop, model, recorder, tracer)
    return rl.Player(loop, model, recorder, tracer, scheduler)


def earlier_tracer(loop, model):
    """Return a tracer that nobody has ended, and its maps, if it was to run and they are any."""
    if loop.earlier == "none":
        return None, None
    alone, scheduler, tracer = replace(loop, foreign=(), interrupt=None), rl.make_scheduler(loop), None
    try:
        tracer = start(loop, model, scheduler)
        if loop.earlier == "ran":
            player(alone, model, rl.Recorder(unet_of(model), loop), tracer, scheduler).play()
            return tracer, tracer.maps()
    except ValueError:
        pass  # refused
    return tracer, None


def unet_of(model):
    return getattr(model, "unet", model)


def check(loop):
    """Return how a loop ended: "right", or the sentence of the refusal. Anything else is an error."""
    model = MODELS[loop.model]
    denoiser = unet_of(model)
    recorder = rl.Recorder(denoiser, loop)
    with recorder.recording():
        player(loop, model, recorder).play()
    scheduler, blank = rl.make_scheduler(loop), rl.Recorder(denoiser, loop)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser.modules())
    earlier, before = earlier_tracer(loop, model)
    try:
        with start(loop, model, scheduler) as tracer:
            player(loop, model, blank, tracer, scheduler).play()
        maps = tracer.maps()
    except ValueError as refusal:
        return str(refusal)
    finally:
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser.modules())
    if before is not None:  # the one that came after it has changed nothing
        assert earlier.maps().ulam("r2g").equal(before.ulam("r2g"))
        assert earlier.maps().provenance["calls"] == before.provenance["calls"]
    if loop.guide == "calls" and loop.then == "stop" and maps.provenance["calls"]["seen"] == 1:
        return "one call came and no more: nobody could tell that it was not the conditional one"
    if loop.tiles and not loop.placed and any("is it tiles?" in how for how in maps.provenance["guidance"]):
        return "without steps and with guidance='none' several latents at one timestep count, and the maps say so"
    skip = int(loop.model == "pipeline")  # a class token
    layers = list(dict.fromkeys(s.layer for s in recorder.seen))
    assert maps.recorded_layers == layers
    for layer in layers:
        want = rl.truth(loop, recorder.seen, layer)
        ran = [i for i, x in enumerate(want["g2r"]) if x is not None]
        counts = [sum(s.layer == layer and s.label.group == g for s in recorder.seen) for g in range(loop.time_groups)]
        assert maps.counts()[layer] == counts, (layer, maps.counts()[layer], counts)
        same(maps.tlam("r2g", layers=layer), want["r2g"], ran)
        g2r, part = ([None if x is None else x[..., skip:] for x in want[name]] for name in ("g2r", "part"))
        same(maps.tlam("g2r", layers=layer).flatten(2), g2r, ran)
        if loop.region:
            same(maps.sram("corner", level="time", layers=layer).flatten(2), part, ran)
        if loop.record and not maps.recorded:  # its only forward was interrupted
            with pytest.raises(ValueError, match="a forward that fails half-way leaves none"):
                maps.sram((0, 0))
        elif loop.record:
            corner = torch.zeros(4, 4)
            corner[:2, :2] = 1
            kept = rl.truth(loop, [s for s in recorder.seen if s.label.whole], layer)["part"]
            ran = [i for i, x in enumerate(kept) if x is not None]
            part = [None if x is None else x[..., skip:] for x in kept]
            same(maps.sram(corner, level="time", layers=layer).flatten(2), part, ran)
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

    phases = (Phase.explicit, Phase.generate)  # a loop that fails is short enough

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
        **options,
    )
    @given(rl.loops(model))
    def one(loop):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = check(loop)
        assert end == "right" or len(end.split()) > 8, end
        ends[end[:60]] += 1

    one()
    return ends


@pytest.mark.parametrize(("model", "count"), [("unet", 20), ("joint", 25), ("pipeline", 8)])
def test_loops(model, count):
    ends = draw(model, count, derandomize=True)
    assert ends["right"] > count // 4, ends  # a net that refuses everything catches nothing
    if model != "pipeline":  # which says itself what its calls are
        assert sum(ends.values()) - ends["right"] >= 3, ends


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_many_loops(model):
    ends = draw(model, 200 if model == "pipeline" else 1000)
    print(model, dict(ends.most_common()))
