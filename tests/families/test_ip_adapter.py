"""IP-Adapters on UNets, of every kind, against a materialised recomputation from the untraced run."""

import pytest
import torch

import i2am
from i2am.families import registry
from tests import support_table as support
from tests.helpers.families import GUIDED, PROMPT, check_levels, run_at
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, capture

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
    go = run_at(pipe, ip_adapter_image=pipelines.image(seed=3), **inputs)
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
    go = run_at(pipe, ip_adapter_image=[pipelines.image(seed=3), pipelines.image(seed=4)], **PROMPT)
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
    go = run_at(pipe, ip_adapter_image=[[pipelines.image(seed=3), pipelines.image(seed=4)]], **PROMPT)
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
    go = run_at(pipe, ip_adapter_image=images, cross_attention_kwargs={"ip_adapter_masks": masks}, **PROMPT)
    calls, plain = capture(pipe.unet, go), go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
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
    go = run_at(pipe, ip_adapter_image=pipelines.image(seed=3), **PROMPT)
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
        go = run_at(
            pipe, ip_adapter_image=pipelines.image(), num_images_per_prompt=3, guidance_scale=guidance, **PROMPT
        )
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


def test_kolors_projects_its_text_besides():
    """Its UNet projects the text where IP-Adapters project pictures: both are kept, and one is a reference."""
    pipe = pipelines.sdxl("full")
    unet = pipe.unet
    assert registry.verdict_on(
        type("KolorsPipeline", (object,), {"__module__": "diffusers", "__call__": lambda self: None})
    ).adapter
    unet.register_module("text_encoder_hid_proj", torch.nn.Linear(2 * pipelines.CONTEXT, 2 * pipelines.CONTEXT))
    go = run_at(pipe, ip_adapter_image=pipelines.image(seed=3), **PROMPT)
    calls = capture(unet, go)
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    truth = Truth(calls, nth=1, samples=GUIDED, groups=[0, 0, 1, 1], reference_grid=pipelines.PATCHES, skip=1)
    check_levels(tracer.maps(), truth, 2)
