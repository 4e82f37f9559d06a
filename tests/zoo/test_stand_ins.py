"""Stand-ins for published pipelines: their classes, traced without a word about what they are."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am.zoo import stand_ins

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(seed: int, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def test_ip_adapter():
    pipe = stand_ins.ip_adapter()
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)
    call = dict(prompt="a shirt", ip_adapter_image=picture(0), num_inference_steps=2, output_type="np")
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with i2am.trace(pipe, sram={"left": (32, 10)}) as tracer:
        traced = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    maps = tracer.maps()
    assert np.abs(traced - plain).max() < 1e-3
    assert maps.canvas == (64, 64)
    assert maps.ulam("g2r").shape == maps.sram("left").shape == (1, 8, 8)
    assert maps.ulam("r2g").shape == (1, 32, 32)
    assert maps.ulam("g2r", normalize="lift").max() > 1.02  # not flat
    other = pipe(**call | {"ip_adapter_image": picture(1)}, generator=torch.Generator().manual_seed(0)).images
    assert np.abs(other - plain).max() > 1e-3  # the reference matters


def test_flux_kontext():
    pipe = stand_ins.flux_kontext()
    assert isinstance(pipe, diffusers.FluxKontextPipeline)
    size = dict(height=32, width=32, max_area=32 * 32, _auto_resize=False)
    with i2am.trace(pipe) as tracer:
        pipe(image=picture(0, 32), **stand_ins.flux_prompt(), **size, num_inference_steps=2, output_type="np")
    maps = tracer.maps()
    assert maps.ulam("r2g").shape == maps.ulam("g2r").shape == (1, 8, 8)
    assert maps.canvas == (32, 32)


def test_the_same_weights_every_time():
    first, again = stand_ins.ip_adapter().unet, stand_ins.ip_adapter().unet
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
