"""What maps of a traced model are asked for, and several runs, against a materialised recomputation."""

import pytest
import torch

import i2am
from tests.helpers.families import GUIDED, PROMPT, denoise, run_at
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture


def test_options():
    narrow = pipelines.unet()
    latents, context = torch.randn(1, 4, 12, 8), torch.randn(2, 6, pipelines.CONTEXT)
    scheduler = pipelines.ddim()
    truth = Truth(
        capture(narrow, lambda: denoise(narrow, scheduler, context, latents)),
        samples=GUIDED,
        groups=[0, 1, 2, 3],
        reference_grid=(2, 3),
    )
    with i2am.patch_unet(narrow, reference=i2am.Reference(grid=(2, 3)), scheduler=scheduler, time_groups=4) as tracer:
        denoise(narrow, scheduler, context, latents)
    maps = tracer.maps()
    up = [name for name in truth.maps if name.startswith("up_blocks.1")]
    everything = list(truth.maps)
    assert maps.recorded_layers == everything
    assert_peak(maps.ulam("r2g", layers="up_blocks.1.*"), truth.ulam("r2g", names=up))
    assert_peak(maps.llam("r2g", layers="*"), truth.llam("r2g", names=everything))
    assert_peak(
        maps.llam("r2g", layers=lambda name: "mid" in name),
        truth.llam("r2g", names=[n for n in everything if "mid" in n]),
    )
    assert_peak(maps.ulam("r2g", size=(5, 7)), truth.ulam("r2g", size=(5, 7)))
    assert_peak(maps.ulam("g2r", times=[1, 3]), truth.ulam("g2r", groups=[1, 3]))
    assert_peak(maps.tlam("r2g", times=-1), truth.ulam("r2g", groups=[3])[:, None])
    assert_peak(maps.hlam("r2g", heads=slice(1, 3)), truth.hlam("r2g")[:, 1:3])
    assert_peak(maps.ulam("r2g", heads=2), truth.hlam("r2g")[:, 2])
    assert_peak(maps.ulam("r2g", normalize="lift"), truth.ulam("r2g", lift=True))
    assert_peak(maps.ulam("g2r", normalize="lift"), truth.ulam("g2r", lift=True))
    assert maps.ulam("g2r", normalize="lift").mean().item() == pytest.approx(1, abs=1e-4)


def test_several_runs_accumulate():
    pipe = pipelines.sd("full")
    go = run_at(pipe, ip_adapter_image=pipelines.image(), **PROMPT)
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
        once = tracer.maps()
        go()
        twice = tracer.maps()
        tracer.reset()
        go()
        again = tracer.maps()
    assert set(map(tuple, once.counts().values())) == {(2, 2)}
    assert set(map(tuple, twice.counts().values())) == {(4, 4)}
    torch.testing.assert_close(once.ulam("r2g"), twice.ulam("r2g"))
    assert once.ulam("r2g").equal(again.ulam("r2g"))
