"""Self-attention of UNets and ``mode="self"``: references concatenated to the latents, banked ones, none at all."""

import functools

import diffusers
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

import i2am
import i2am.plot
from tests import support_table as support
from tests.helpers.families import generator, run
from tests.helpers.tiny_models import channels, dit
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import PerLayerGrid, capture_calls, generated
from tests.helpers.truth import Truth, assert_peak

PROMPT = {"prompt": "a b"}
check = functools.partial(support.check, directions=("r2g", "g2r"))


def unet_grid(finest):
    """A call's grid from its number of tokens: ``finest`` halved upwards."""
    grids = [finest]
    for _ in range(3):
        grids.append(tuple(-(-n // 2) for n in grids[-1]))
    by_tokens = {h * w: (h, w) for h, w in grids}
    return lambda call: by_tokens[call.q.shape[2]]


@pytest.mark.parametrize(
    ("build", "inputs", "samples", "grid"),
    [
        (channels.instruct_pix2pix, {"image": pipelines.image((40, 32))}, slice(0, 1), (16, 20)),
        (channels.upscaler, {"image": pipelines.image((12, 10))}, slice(1, 2), (10, 12)),
        (
            pipelines.sd_inpaint,
            {"image": pipelines.image(), "mask_image": pipelines.mask(), "width": 32, "height": 32},
            slice(1, 2),
            (16, 16),
        ),
        (pipelines.sd_controlnet, {"image": pipelines.image()}, slice(1, 2), (16, 16)),
    ],
    ids=["InstructPix2Pix", "x4 upscaler", "inpainting", "ControlNet"],
)
@support.family(
    '`mode="self"` on UNets', "InstructPix2Pix, x4 upscaler, inpainting, ControlNet", "none: spatial self-attention"
)
def test_self_attention_maps_are_named_so(build, inputs, samples, grid):
    pipe = build()
    go = run(pipe, **PROMPT, **inputs)
    truth = PerLayerGrid(
        generated(capture_calls(pipe.unet, go, ("attn1",)), unet_grid(grid)), samples=samples, groups=[0, 0, 1, 1]
    )
    plain = go()
    with i2am.trace(pipe, mode="self", time_groups=2, output="model", record="qk") as tracer:
        assert (go() == plain).all()
    maps = tracer.maps()
    assert maps.references == ["self"]
    assert "'self'" in repr(maps)
    assert maps.layers == truth.layers
    assert all(name.endswith("attn1") for name in maps.recorded_layers)
    check(maps, truth, 2)
    assert (go() == plain).all()
    said = _words(i2am.plot.summary(maps, pipelines.image(), pipelines.image()))
    assert said.count("Self-attention, no reference") == 2
    assert "influenced" not in said


def _words(figure) -> str:
    return " ".join(" ".join(ax.get_title() for ax in figure.axes).split())


@support.family('`mode="self"` on transformers', "FluxFillPipeline", "none: spatial self-attention")
def test_self_attention_of_a_transformer():
    """Flux Fill: the generated tokens' attention to each other, among text."""
    pipe = dit.flux(diffusers.FluxFillPipeline, in_channels=16 + 16 + 16)
    inputs = dict(image=pipelines.image((24, 16)), mask_image=pipelines.mask((24, 16)), width=24, height=16)
    go = run(pipe, **inputs, **dit.flux_prompt())
    calls = capture_calls(pipe.transformer, go, ("FluxAttention",))
    own = slice(5, 29)
    truth = Truth(generated(calls, (4, 6), own), keys=own, groups=[0, 0, 1, 1], reference_grid=(4, 6))
    with i2am.trace(pipe, mode="self", time_groups=2) as tracer:
        go()
    assert tracer.maps().references == ["self"]
    check(tracer.maps(), truth, 2, directions=("r2g", "g2r", "mass"))


def test_modes():
    unet = pipelines.unet()
    with pytest.raises(ValueError, match="mode must be one of reference, self, got 'attn'"):
        i2am.patch_unet(unet, mode="attn")
    with pytest.raises(ValueError, match="looks at no reference"):
        i2am.patch_unet(unet, mode="self", reference=i2am.Reference())
    with i2am.patch_unet(unet, mode="self", num_steps=1) as tracer, torch.no_grad():
        unet(torch.randn(1, 4, 13, 9), 1, torch.randn(1, 3, pipelines.CONTEXT))
    assert tracer.maps().ulam("g2r").shape == (1, 13, 9)


# ------------------------------------------------------------------------------- concatenated latents


class Skip(torch.nn.Module):
    """CatVTON's cross-attention: none."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def try_on(unet, latents, garment, scheduler, axis, steps=4):
    """CatVTON's loop: noise and garment latents beside each other, inpainting channels, batched guidance."""
    scheduler.set_timesteps(steps)
    dim = {"height": -2, "width": -1}[axis]
    beside = torch.cat([torch.zeros_like(garment), garment])
    masked = torch.randn(2 * len(latents), 5, *latents.shape[-2:], generator=generator())
    extra = torch.cat([masked, torch.cat([beside, torch.zeros_like(beside[:, :1])], 1)], dim)
    x = torch.cat([latents, torch.randn(latents.shape, generator=generator())], dim)
    for t in scheduler.timesteps:
        with torch.no_grad():
            uncond, cond = unet(torch.cat([torch.cat([x] * 2), extra], 1), t, encoder_hidden_states=None).sample.chunk(
                2
            )
        x = scheduler.step(uncond + 2.5 * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.parametrize("axis", ["height", "width"])
@support.family(
    "concatenated latents (CatVTON's shape)",
    "`reference=i2am.Concatenated(axis)`",
    "a part of the latents, in self-attention",
)
def test_concatenated_latents(axis):
    unet, scheduler = pipelines.unet(9), pipelines.ddim()
    for name in dict(unet.attn_processors):
        if "attn2" in name:
            unet.get_submodule(name.removesuffix(".processor")).set_processor(Skip())
    latents, garment = torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12)
    go = lambda: try_on(unet, latents, garment, scheduler, axis)  # noqa: E731
    whole = (16, 12) if axis == "height" else (8, 24)
    grid = unet_grid(whole)

    def half(which):
        def tokens(call):
            h, w = grid(call)
            index = torch.arange(h * w).reshape(h, w)
            parts = (index[: h // 2], index[h // 2 :]) if axis == "height" else (index[:, : w // 2], index[:, w // 2 :])
            return parts[which].flatten()

        return tokens

    def part(call):
        h, w = grid(call)
        return (h // 2, w) if axis == "height" else (h, w // 2)

    calls = capture_calls(unet, go, ("attn1",))
    truths = {}
    for call in calls:  # key sets differ between resolutions: a truth each, joined below
        truths.setdefault(part(call), []).append(call)
    joined = None
    for size, same in truths.items():
        truth = PerLayerGrid(
            generated(same, size, half(0)), samples=slice(2, 4), keys=half(1)(same[0]), groups=[0, 0, 1, 1]
        )
        if joined is None:
            joined = truth
        else:
            joined.maps |= truth.maps
            joined.grids |= truth.grids
            joined.lengths |= truth.lengths
    order = [c.layer for c in calls if c.evaluation == 0]
    joined.maps = {name: joined.maps[name] for name in order}
    want = go()
    with i2am.patch_unet(
        unet, reference=i2am.Concatenated(axis), scheduler=scheduler, time_groups=2, output="model"
    ) as tracer:
        assert go().equal(want)
    maps = tracer.maps()
    assert maps.references == ["reference"]
    assert maps.canvas == (8, 12)
    assert maps.ulam("r2g").shape == maps.ulam("g2r").shape == (2, 8, 12)
    check(maps, joined, 2, directions=("r2g", "g2r", "mass"))
    assert go().equal(want)


def test_several_parts_and_the_generated_one_last():
    unet = pipelines.unet()
    x = torch.randn(1, 4, 8, 24)
    with i2am.patch_unet(unet, reference=i2am.Concatenated("width", parts=3, generated=2), num_steps=1) as tracer:
        with torch.no_grad():
            unet(x, 1, torch.randn(1, 3, pipelines.CONTEXT))
    maps = tracer.maps()
    assert maps.references == ["reference_0", "reference_1"]
    finest = maps.layers[0]
    calls = capture_calls(unet, lambda: unet(x, 1, torch.zeros(1, 3, pipelines.CONTEXT)), ("attn1",))
    index = torch.arange(8 * 24).reshape(8, 24)
    for i, name in enumerate(maps.references):
        first = [c for c in calls if c.layer == finest]
        chosen = generated(first, (8, 8), index[:, 16:].flatten())
        truth = Truth(chosen, keys=index[:, 8 * i : 8 * i + 8].flatten(), groups=[0], reference_grid=(8, 8))
        for direction in ("r2g", "g2r", "mass"):  # the first layer sees no text yet
            assert_peak(maps.ulam(direction, layers=finest, reference=name), truth.ulam(direction))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": "depth"}, 'must be "height" or "width"'),
        ({"parts": 1}, "at least 2"),
        ({"generated": 2}, "one of 0…1"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_concatenations_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        i2am.Concatenated(**arguments)


def test_latents_that_do_not_divide():
    unet = pipelines.unet()
    ran = []
    unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with i2am.patch_unet(unet, reference=i2am.Concatenated()), torch.no_grad():
        with pytest.raises(ValueError, match="the latents: height 9 does not divide into 2 parts"):
            unet(torch.randn(1, 4, 9, 8), 1, torch.randn(1, 3, pipelines.CONTEXT))
        assert not ran
        with pytest.raises(ValueError, match=r"layer down_blocks\.1.*height 5 does not divide"):
            unet(torch.randn(1, 4, 10, 8), 1, torch.randn(1, 3, pipelines.CONTEXT))


@pytest.mark.parametrize("mobile", [False, True], ids=["guided", "mobile"])
@support.family(
    "DreamLite", "DreamLitePipeline, DreamLiteMobilePipeline", "the right half of the latents, in self-attention"
)
def test_dreamlite_joins_pictures_along_their_width(mobile):
    """[uncond, image only, cond], and tokens of both halves in turn, row by row."""
    pipe = dit.dreamlite(mobile)

    def go():
        return pipe(
            prompt="x",
            image=pipelines.image((32, 32)),
            width=32,
            height=24,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).images

    calls = capture_calls(pipe.unet, go, ("attn1",))
    assert calls[0].q.shape[0] == (1 if mobile else 3)
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        assert (go() == plain).all()
    maps = tracer.maps()
    assert maps.canvas == (24, 32)
    by_tokens = {h * 2 * w: (h, w) for h, w in ((12, 16), (6, 8), (3, 4))}
    for layer in maps.layers:
        mine = [c for c in calls if c.layer == layer]
        h, w = by_tokens[mine[0].q.shape[2]]
        index = torch.arange(2 * h * w).reshape(h, 2 * w)
        truth = Truth(
            generated(mine, (h, w), index[:, :w].flatten()),
            samples=slice(-1, None),
            keys=index[:, w:].flatten(),
            groups=[0, 0, 1, 1],
            reference_grid=(h, w),
        )
        support.check(maps, truth, 2, layers=layer)


@pytest.mark.parametrize("mobile", [False, True], ids=["guided", "mobile"])
def test_dreamlite_without_an_image_is_refused(mobile):
    """Its right half is zeros then."""
    pipe = dit.dreamlite(mobile)
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        pipe(prompt="x", width=32, height=24, num_inference_steps=1, output_type="np")


# --------------------------------------------------------------------------------------------------- banked references


class Bank:
    """A reference network's self-attention inputs, among the tokens of the drawing network's, or its keys only."""

    def __init__(self, writer, reader, count, keys_only):
        self.count, self.keys_only, self.bank = count, keys_only, {}
        for name, block in writer.named_modules():
            if isinstance(block, BasicTransformerBlock):
                block.attn1.register_forward_pre_hook(
                    lambda _, x, name=name: self.bank.setdefault(name, []).append(x[0])
                )
        for name, block in list(reader.named_modules()):
            if isinstance(block, BasicTransformerBlock):
                self.wrap(block, name)

    def wrap(self, block, name):
        attention = block.attn1

        class Joined(torch.nn.Module):
            def __init__(joined):
                super().__init__()
                joined.attention = attention

            def forward(joined, x, encoder_hidden_states=None, **kwargs):
                banked = [b.repeat(len(x) // len(b), 1, 1) for b in self.bank.get(name, [])[: self.count]]
                together = torch.cat([x, *banked], dim=1)
                if self.keys_only:
                    return joined.attention(x, encoder_hidden_states=together if banked else None)
                return joined.attention(together)[:, : x.shape[1]]

        block.attn1 = Joined()


@pytest.mark.parametrize("keys_only", [True, False], ids=["reference-only", "IDM-VTON"])
@pytest.mark.parametrize("count", [1, 2])
@support.family(
    "banked self-attention (IDM-VTON's, reference-only's shape)",
    "`reference=i2am.Banked()`",
    "behind the layer's own keys, several references",
)
def test_banked_references(keys_only, count):
    writer, reader = pipelines.unet(seed=1), pipelines.unet()
    scheduler = pipelines.ddim()
    bank = Bank(writer, reader, count, keys_only)
    context = torch.randn(2, 3, pipelines.CONTEXT)
    latents, references = torch.randn(1, 4, 10, 8), torch.randn(count, 4, 10, 8)

    @torch.no_grad()
    def go():
        bank.bank.clear()
        for reference in references:
            writer(reference[None], 0, context[:1])
        scheduler.set_timesteps(4)
        x = latents
        for t in scheduler.timesteps:
            uncond, cond = reader(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(uncond + 3 * (cond - uncond), t, x).prev_sample
        return x

    calls = capture_calls(reader, go, ("attention",))
    for call in calls:
        assert call.k.shape[2] % (1 + count) == 0
    own = lambda call: call.k.shape[2] // (1 + count)  # noqa: E731
    want = go()
    with i2am.patch_unet(
        reader, reference=i2am.Banked(), scheduler=scheduler, time_groups=2, output="model", record="qk"
    ) as tracer:
        assert go().equal(want)
    maps = tracer.maps()
    names = ["reference"] if count == 1 else ["reference_0", "reference_1"]
    assert maps.references == names
    for i, name in enumerate(names, start=1):
        for layer in maps.layers:
            mine = [c for c in calls if c.layer == layer]
            n = own(mine[0])
            h, w = next(g for g in [(10, 8), (5, 4), (3, 2)] if g[0] * g[1] == n)
            truth = Truth(
                generated(mine, (h, w), slice(0, n)),
                samples=slice(1, 2),
                keys=slice(i * n, (i + 1) * n),
                groups=[0, 0, 1, 1],
                reference_grid=(h, w),
            )
            support.check(maps, truth, 2, layers=layer, reference=name)


def test_a_pass_without_banked_keys_does_not_count():
    unet = pipelines.unet()
    with i2am.patch_unet(unet, reference=i2am.Banked(), num_steps=1) as tracer, torch.no_grad():
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, pipelines.CONTEXT))
    with pytest.raises(ValueError, match="nothing was recorded"):
        tracer.maps()
