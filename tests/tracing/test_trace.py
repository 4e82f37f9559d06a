"""Traced pipelines and UNets against a materialised recomputation from the untraced run's own q and k."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture

GUIDED = slice(1, 2)  # [uncond, cond] of one image


def generator():
    return torch.Generator().manual_seed(7)


def run(pipe, steps=4, size=(32, 32), **kwargs):
    width, height = size
    return lambda: (
        pipe(
            generator=generator(), num_inference_steps=steps, width=width, height=height, output_type="np", **kwargs
        ).images
    )


def check_levels(maps, truth, T, reference=None, directions=("r2g", "g2r")):
    for direction in directions:
        assert_peak(maps.ulam(direction, reference=reference), truth.ulam(direction))
        assert_peak(maps.tlam(direction, reference=reference), truth.tlam(direction, T))
        assert_peak(maps.llam(direction, reference=reference), truth.llam(direction))
        heads = {name: m[0][1]["r2g"].shape[1] for name, m in truth.maps.items()}
        support.note(direction, "ulam", "tlam", "llam")
        if len(set(heads.values())) == 1:
            assert_peak(maps.hlam(direction, reference=reference), truth.hlam(direction))
            support.note(direction, "hlam")


# ------------------------------------------------------------------------------------------------------- bare UNet


def denoise(unet, scheduler, context, latents, steps=4, guidance=3.0):
    """A hand-written loop with batched guidance; returns the final latents."""
    scheduler.set_timesteps(steps)
    x = latents.clone()
    for t in scheduler.timesteps:
        with torch.no_grad():
            uncond, cond = unet(torch.cat([x, x]), t, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


@pytest.fixture(scope="module")
def narrow():
    return pipelines.unet()


@pytest.mark.parametrize("output", ["i2am", "model"])
@pytest.mark.parametrize(
    ("tokens", "reference"),
    [
        (1, i2am.Reference()),
        (48, i2am.Reference(grid=(8, 6))),
        (49, i2am.Reference(grid=(8, 6), skip=1)),
        (20, i2am.Reference(grid=(3, 4), tokens=slice(8, 20))),
        (12, i2am.Reference(grid=(2, 3), tokens=[9, 1, 0, 4, 5, 11])),
    ],
    ids=["1", "48", "cls+48", "tail 12 of 20", "6 scattered of 12"],
)
@support.family("any UNet with described keys", "`i2am.patch_unet(reference=…)`", "any of the cross-attention's")
def test_unet_levels(narrow, tokens, reference, output):
    latents = torch.randn(2, 4, 13, 9)  # two images, odd grid: 13×9, 7×5 (and 4×3 in the mid block)
    context = torch.randn(4, tokens, pipelines.CONTEXT)
    scheduler = pipelines.ddim()
    truth = Truth(
        capture(narrow, lambda: denoise(narrow, scheduler, context, latents)),
        samples=slice(2, 4),
        keys=reference.tokens,
        groups=[0, 0, 1, 1],
        reference_grid=reference.grid,
        skip=reference.skip,
    )
    want = denoise(narrow, scheduler, context, latents)
    with i2am.patch_unet(narrow, reference=reference, num_steps=4, time_groups=2, output=output) as tracer:
        got = denoise(narrow, scheduler, context, latents)
    maps = tracer.maps()
    if output == "model":
        assert got.equal(want)
    else:
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
    check_levels(maps, truth, 2, directions=("r2g",) if reference.grid is None else ("r2g", "g2r"))
    assert maps.layers == truth.layers
    assert denoise(narrow, scheduler, context, latents).equal(want)
    if tokens == 1:
        with pytest.raises(ValueError, match="identically 1"):
            maps.ulam("g2r")
    if reference.count(tokens) < tokens:
        assert_peak(maps.ulam("mass"), truth.ulam("mass"))
    else:
        with pytest.raises(ValueError, match="all the keys"):
            maps.ulam("mass")


def test_options(narrow):
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


# ------------------------------------------------------------------------------------------------------- pipelines


@support.family("Paint-by-Example", "PaintByExamplePipeline", "one CLIP token")
def test_paint_by_example():
    pipe = pipelines.paint_by_example()
    size = (40, 32)
    go = run(
        pipe,
        size=size,
        image=pipelines.image(size),
        mask_image=pipelines.mask(size),
        example_image=pipelines.image(seed=3),
    )
    truth = Truth(capture(pipe.unet, go), samples=GUIDED, groups=[0, 0, 1, 1])
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    maps = tracer.maps()
    assert maps.ulam("r2g").shape == (1, 16, 20)
    check_levels(maps, truth, 2, directions=("r2g",))


@support.family("SD Image Variation", "StableDiffusionImageVariationPipeline", "one CLIP token")
def test_image_variation():
    pipe = pipelines.image_variation()
    go = run(pipe, image=pipelines.image())
    truth = Truth(capture(pipe.unet, go), samples=GUIDED, groups=[0, 0, 1, 1])
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    check_levels(tracer.maps(), truth, 2, directions=("r2g",))


@support.family("Versatile Diffusion", "VersatileDiffusionImageVariationPipeline", "CLIP's class token and patches")
def test_versatile_image_variation():
    pipe = pipelines.versatile()
    go = run(pipe, size=(48, 32), image=pipelines.image())
    truth = Truth(
        capture(pipe.image_unet, go), samples=GUIDED, groups=[0, 0, 1, 1], reference_grid=pipelines.PATCHES, skip=1
    )
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    check_levels(tracer.maps(), truth, 2)


PROMPT = {"prompt": "a b"}
ADAPTERS = {
    "sd": (pipelines.sd, PROMPT),
    "sdxl": (pipelines.sdxl, PROMPT),
    "inpaint": (pipelines.sd_inpaint, PROMPT | {"image": pipelines.image(), "mask_image": pipelines.mask()}),
    "controlnet": (pipelines.sd_controlnet, PROMPT | {"image": pipelines.image()}),
}


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("name", ADAPTERS)
@support.family(
    "IP-Adapter: base, plus, full",
    "SD 1.5, SDXL, inpainting, ControlNet",
    "a call of the adapter's own (grid: full alone)",
)
def test_ip_adapter(name, kind):
    build, inputs = ADAPTERS[name]
    pipe = build(kind)
    go = run(pipe, ip_adapter_image=pipelines.image(seed=3), **inputs)
    grid = pipelines.PATCHES if kind == "full" else None
    truth = Truth(
        capture(pipe.unet, go), nth=1, samples=GUIDED, groups=[0, 0, 1, 1], reference_grid=grid, skip=1 if grid else 0
    )
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    maps = tracer.maps()
    assert maps.references == ["ip_adapter"]
    check_levels(maps, truth, 2, directions=("r2g", "g2r") if grid else ("r2g",))
    if not grid:
        with pytest.raises(ValueError, match="no 2-D layout"):
            maps.ulam("g2r")
    if name == "sdxl":
        with pytest.raises(ValueError, match=r"equal head count.*attn2: 2.*attn2: 4"):
            maps.hlam("r2g")
        assert maps.hlam("r2g", layers="up_blocks.2.*").shape[1] == 2


def test_two_adapters_are_told_apart():
    pipe = pipelines.sd("base", "full")
    go = run(pipe, ip_adapter_image=[pipelines.image(seed=3), pipelines.image(seed=4)], **PROMPT)
    calls = capture(pipe.unet, go)
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    maps = tracer.maps()
    assert maps.references == ["ip_adapter_0", "ip_adapter_1"]
    with pytest.raises(ValueError, match="'ip_adapter_0', 'ip_adapter_1'"):
        maps.ulam("r2g")
    common = dict(samples=GUIDED, groups=[0, 0, 1, 1])
    check_levels(maps, Truth(calls, nth=1, **common), 2, reference="ip_adapter_0", directions=("r2g",))
    full = Truth(calls, nth=2, reference_grid=pipelines.PATCHES, skip=1, **common)
    check_levels(maps, full, 2, reference="ip_adapter_1")


def test_two_images_in_one_adapter():
    pipe = pipelines.sd("full")
    go = run(pipe, ip_adapter_image=[[pipelines.image(seed=3), pipelines.image(seed=4)]], **PROMPT)
    calls = capture(pipe.unet, go)
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    maps = tracer.maps()
    assert maps.references == ["ip_adapter.image_0", "ip_adapter.image_1"]
    for i, name in enumerate(maps.references):
        keys = slice(17 * i, 17 * (i + 1))
        truth = Truth(
            calls, nth=1, keys=keys, samples=GUIDED, groups=[0, 0, 1, 1], reference_grid=pipelines.PATCHES, skip=1
        )
        check_levels(maps, truth, 2, reference=name, directions=("r2g", "g2r", "mass"))


def test_masked_images_come_one_by_one():
    from diffusers.image_processor import IPAdapterMaskProcessor

    pipe = pipelines.sd("base", "full")
    masks = IPAdapterMaskProcessor().preprocess([pipelines.mask(), pipelines.mask()], height=32, width=32)
    masks = [masks[:1].reshape(1, 1, 32, 32), masks.reshape(1, 2, 32, 32)]
    images = [[pipelines.image(seed=3)], [pipelines.image(seed=4), pipelines.image(seed=5)]]
    go = run(pipe, ip_adapter_image=images, cross_attention_kwargs={"ip_adapter_masks": masks}, **PROMPT)
    calls, plain = capture(pipe.unet, go), go()
    with i2am.trace(pipe, time_groups=2, output="model") as tracer:
        traced = go()
    maps = tracer.maps()
    assert (plain == traced).all()
    assert maps.references == ["ip_adapter_0", "ip_adapter_1.image_0", "ip_adapter_1.image_1"]
    for nth, name in enumerate(maps.references, start=1):
        grid = pipelines.PATCHES if "image" in name else None
        truth = Truth(calls, nth=nth, samples=GUIDED, groups=[0, 0, 1, 1], reference_grid=grid, skip=1 if grid else 0)
        check_levels(maps, truth, 2, reference=name, directions=("r2g", "g2r") if grid else ("r2g",))


def test_scale_zero_is_skipped():
    pipe = pipelines.sd("full")
    pipe.set_ip_adapter_scale({"up": {"block_2": [1.0, 1.0]}})  # InstantStyle: every other layer has scale 0
    go = run(pipe, ip_adapter_image=pipelines.image(seed=3), **PROMPT)
    with i2am.trace(pipe) as tracer:
        go()
    assert tracer.maps().recorded_layers == [f"up_blocks.2.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)]
    pipe.set_ip_adapter_scale(0.0)
    with i2am.trace(pipe) as tracer:
        go()
    with pytest.raises(ValueError, match="scale 0"):
        tracer.maps()


def test_several_images_and_no_guidance():
    pipe = pipelines.sd("full")
    for guidance, samples in ((5.0, slice(3, 6)), (1.0, slice(0, 3))):
        go = run(pipe, ip_adapter_image=pipelines.image(), num_images_per_prompt=3, guidance_scale=guidance, **PROMPT)
        truth = Truth(
            capture(pipe.unet, go),
            nth=1,
            samples=samples,
            groups=[0, 0, 1, 1],
            reference_grid=pipelines.PATCHES,
            skip=1,
        )
        with i2am.trace(pipe, time_groups=2) as tracer:
            go()
        assert tracer.maps().batch == 3
        check_levels(tracer.maps(), truth, 2)


def test_several_runs_accumulate():
    pipe = pipelines.sd("full")
    go = run(pipe, ip_adapter_image=pipelines.image(), **PROMPT)
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
