"""In-context diffusion transformers: maps against a materialised recomputation from the untraced pipeline's q and k."""

import functools

import diffusers
import pytest
import torch

import i2am
from i2am.families.joint import Positions, Segment
from tests import support_table as support
from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak

KONTEXT = "FLUX.1 Kontext", "FluxKontextPipeline, FluxKontextInpaintPipeline", "tokens in context"
FLUX2 = (
    "FLUX.2, Klein",
    "Flux2Pipeline, Flux2KleinPipeline, Flux2KleinInpaintPipeline",
    "tokens in context, several references",
)
QWEN = (
    "Qwen-Image-Edit, -Plus",
    "QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageEditInpaintPipeline",
    "tokens in context, several references",
)
KINDS = ("FluxAttention", "Flux2Attention", "Flux2ParallelSelfAttention", "transformer_blocks")
ALL = ("r2g", "g2r", "mass")


check = functools.partial(support.check, directions=("r2g", "g2r", "mass"))


def generator():
    return torch.Generator().manual_seed(7)


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks")
    return {(n, h): len(getattr(m, h)) for n, m in model.named_modules() for h in names}


def traced(pipe, go, **options):
    """Maps of ``go()``; asserts that tracing left nothing behind."""
    before, plain = hooks(pipe.transformer), go()
    with i2am.trace(pipe, time_groups=2, output="model", **options) as tracer:
        got = go()
    assert (got == plain).all()
    assert hooks(pipe.transformer) == before
    assert (go() == plain).all()
    with i2am.trace(pipe, time_groups=2, **options) as fused:
        close = go()
    assert abs(close - plain).max() < 1e-3
    assert tracer.maps().canvas == plain.shape[1:3]  # pixels of the picture
    for direction in ("r2g", "g2r"):
        for name in tracer.maps().references:
            a, b = (t.maps().ulam(direction, reference=name) for t in (tracer, fused))
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    return tracer.maps()


# --------------------------------------------------------------------------------------------------------- Kontext


def kontext(pipe, size=(24, 16), reference=(32, 16), **options):
    """``size`` and ``reference`` are (width, height)."""
    width, height = size
    image = pipelines.image(reference)
    return lambda: (
        pipe(
            image=image,
            width=width,
            height=height,
            max_area=width * height,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
            **(dict(_auto_resize=False) | dit.flux_prompt() | options),
        ).images
    )


@pytest.mark.parametrize("images", [1, 2])
@support.family(*KONTEXT)
def test_kontext(images):
    pipe = dit.flux()
    go = kontext(pipe, num_images_per_prompt=images)
    calls = capture_calls(pipe.transformer, go, KINDS)
    gen, ref = (4, 6), (4, 8)  # tokens of 4 pixels
    truth = Truth(generated(calls, gen, slice(5, 29)), keys=slice(29, 61), groups=[0, 0, 1, 1], reference_grid=ref)
    maps = traced(pipe, go)
    assert maps.references == ["reference"]
    assert maps.layers == list(truth.maps)
    assert len(maps.layers) == 4
    assert maps.ulam("r2g").shape == (images, 4, 6)
    assert maps.ulam("g2r").shape == (images, 4, 8)
    check(maps, truth, 2)


@support.family(*KONTEXT)
def test_kontext_in_bfloat16():
    """What people run: position ids and timesteps are of that kind too."""
    pipe = dit.flux().to(torch.bfloat16)
    go = kontext(pipe, prompt_embeds=dit.text_tokens(5).bfloat16(), pooled_prompt_embeds=torch.ones(1, 8).bfloat16())
    calls = capture_calls(pipe.transformer, go, KINDS)
    assert calls[0].q.dtype == torch.bfloat16
    chosen = generated(calls, (4, 6), slice(5, 29))
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model") as tracer:
        assert (go() == plain).all()
    check(tracer.maps(), Truth(chosen, keys=slice(29, 61), groups=[0, 0, 1, 1], reference_grid=(4, 8)), 2)


@support.family(*KONTEXT)
def test_kontext_resizes_its_reference(monkeypatch):
    """To the one of its sizes that comes closest to the shape: grids are the model's, not the picture's."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext_module

    monkeypatch.setattr(kontext_module, "PREFERRED_KONTEXT_RESOLUTIONS", [(20, 44), (32, 32), (44, 20)])
    pipe = dit.flux()
    go = kontext(pipe, reference=(90, 40), _auto_resize=True)
    calls = capture_calls(pipe.transformer, go, KINDS)
    chosen = generated(calls, (4, 6), slice(5, 29))
    truth = Truth(chosen, keys=slice(29, 29 + 55), groups=[0, 0, 1, 1], reference_grid=(5, 11))
    check(traced(pipe, go), truth, 2)


@support.family(*KONTEXT)
def test_kontext_true_guidance_counts_the_conditional_call_alone():
    pipe = dit.flux()
    negative = dit.flux_prompt(seed=3, prefix="negative_")
    go = kontext(pipe, true_cfg_scale=3.0, **negative)
    calls = capture_calls(pipe.transformer, go, KINDS)
    assert {c.evaluation for c in calls} == set(range(8))
    common = dict(keys=slice(29, 61), groups=[0] * 4 + [1] * 4, reference_grid=(4, 8))
    conditional = Truth(generated(calls, (4, 6), slice(5, 29), evaluations=range(0, 8, 2)), **common)
    negated = Truth(generated(calls, (4, 6), slice(5, 29), evaluations=range(1, 8, 2)), **common)
    maps = traced(pipe, go)
    check(maps, conditional, 2)
    assert set(map(tuple, maps.counts().values())) == {(2, 2)}
    check(traced(pipe, go, guidance=1), negated, 2)
    check(traced(pipe, go, guidance="none"), Truth(generated(calls, (4, 6), slice(5, 29)), **common), 2)


@support.family(*KONTEXT)
def test_kontext_inpainting():
    """Reference and mask: the picture's own latents come back in after each step, which attention does not see."""
    pipe = dit.flux(diffusers.FluxKontextInpaintPipeline)
    size = (24, 16)

    def go():
        return pipe(
            image=pipelines.image(size),
            mask_image=pipelines.mask(size),
            image_reference=pipelines.image((32, 16), seed=2),
            width=24,
            height=16,
            max_area=24 * 16,
            _auto_resize=False,
            strength=0.5,
            num_inference_steps=8,
            generator=generator(),
            output_type="np",
            **dit.flux_prompt(),
        ).images

    calls = capture_calls(pipe.transformer, go, KINDS)
    assert calls[-1].evaluation + 1 == 4
    keys = calls[0].k.shape[2] - 29
    maps = traced(pipe, go)
    grid = tuple(maps.ulam("g2r").shape[1:])
    truth = Truth(
        generated(calls, (4, 6), slice(5, 29)), keys=slice(29, 29 + keys), groups=[0, 0, 1, 1], reference_grid=(4, 8)
    )
    assert grid == (4, 8)
    check(maps, truth, 2)


@support.family("any of these transformers, bare", "`i2am.patch_transformer`", "as its pipeline lays them out")
@pytest.mark.parametrize("fresh", [False, True], ids=["same tensor", "equal tensor"])
@pytest.mark.parametrize("clock", ["num_steps", "scheduler", "timestep"])
def test_bare_transformer(clock, fresh):
    """A loop of one's own; guidance is calls of its own, of which the user says which one is conditional."""
    transformer, scheduler = dit.flux_transformer(), dit.flow()
    ids = torch.cat(
        [torch.cartesian_prod(*map(torch.arange, (1, 2, 3))), torch.cartesian_prod(*map(torch.arange, (1, 4, 2)))]
    )
    ids[6:, 0] = 1
    reference, noise = torch.randn(2, 8, 16), torch.randn(2, 6, 16)

    @torch.no_grad()
    def go():
        scheduler.set_timesteps(4)
        x = noise
        for t in scheduler.timesteps:
            given = dict(
                hidden_states=torch.cat([x, reference], dim=1),
                timestep=t.expand(2) / 1000,
                guidance=torch.ones(2),
                img_ids=ids,
                pooled_projections=torch.zeros(2, 8),
            )
            noises = [
                transformer(
                    encoder_hidden_states=dit.text_tokens(n, batch=2),
                    txt_ids=torch.zeros(n, 3),
                    **(given | {"hidden_states": given["hidden_states"].clone()} if fresh else given),
                ).sample
                for n in (5, 3)  # conditional, then unconditional with a shorter prompt
            ]
            x = scheduler.step((3 * noises[0] - 2 * noises[1])[:, :6], t, x).prev_sample
        return x

    calls = capture_calls(transformer, go, KINDS)
    groups = [0] * 4 + [1] * 4
    if clock == "timestep":  # equal ranges of [0, 1000)
        scheduler.set_timesteps(4)
        groups = [int(float(t) < 500) for t in scheduler.timesteps for _ in range(2)]
    truth = Truth(
        generated(calls, (2, 3), slice(5, 11), evaluations=range(0, 8, 2)),
        keys=slice(11, 19),
        groups=groups,
        reference_grid=(4, 2),
    )
    options = {"num_steps": {"num_steps": 4}, "scheduler": {"scheduler": scheduler}, "timestep": {}}[clock]
    want = go()
    with i2am.patch_transformer(transformer, time_groups=2, output="model", guidance=0, **options) as tracer:
        assert go().equal(want)
    check(tracer.maps(), truth, 2)
    assert tracer.maps().canvas == (2, 3)
    with i2am.patch_transformer(transformer, time_groups=2, **options) as tracer:
        with pytest.raises(ValueError, match=r"2 calls at timestep 1000 on the same latents.*guidance=0"):
            go()
        with pytest.raises(ValueError, match="no maps that can be trusted"):
            tracer.maps()
    assert go().equal(want)


def test_patches_of_an_in_context_model_can_be_asked():
    pipe = dit.flux()
    go = kontext(pipe)
    calls = capture_calls(pipe.transformer, go, KINDS)
    rows = [
        (c.q.double() @ c.k.double().mT / c.q.shape[-1] ** 0.5).softmax(-1)[:, :, 5 + 1 * 6 + 1, 29:61] for c in calls
    ]
    truth = torch.stack(rows).mean((0, 2)).reshape(1, 4, 8)  # every layer has the same heads
    with i2am.trace(pipe, record="qk", sram={"eye": (5, 7)}) as tracer:  # pixels, of tokens of 4
        go()
    maps = tracer.maps()
    assert_peak(maps.sram("eye"), truth)
    assert_peak(maps.sram((5, 7)), truth)
    assert maps.match().expected.shape == (1, 4, 6, 2)


def test_pictures_that_share_a_number_are_refused():
    """Side by side, two of them fill a grid, but not row by row."""
    transformer = dit.flux_transformer(num_layers=1, num_single_layers=0)
    generated, left = (torch.cartesian_prod(*map(torch.arange, n)) for n in ((1, 2, 3), (1, 2, 2)))
    left[:, 0] = 1
    right = left + torch.tensor([0, 0, 2])

    def go(*references):
        ids = torch.cat([generated, *references])
        with torch.no_grad():
            transformer(
                hidden_states=torch.randn(1, len(ids), 16),
                encoder_hidden_states=dit.text_tokens(3),
                pooled_projections=torch.zeros(1, 8),
                timestep=torch.tensor([0.5]),
                guidance=torch.ones(1),
                img_ids=ids.bfloat16(),
                txt_ids=torch.zeros(3, 3),
            )

    with i2am.patch_transformer(transformer, num_steps=1) as tracer:
        with pytest.raises(ValueError, match=r"picture 1 .* 8 tokens, which do not go through \(2, 4\) row by row"):
            go(left, right)
        with pytest.raises(ValueError, match=r"picture 1 .* 7 tokens, which do not fill \(2, 4\)"):
            go(left, right[:3])
        go(left, right + torch.tensor([1, 0, 0]))
    assert [tuple(tracer.maps().ulam("g2r", reference=name).shape) for name in tracer.maps().references] == [
        (1, 2, 2),
        (1, 2, 2),
    ]


def test_a_reference_before_the_generated_picture():
    """The generated picture's number is the smallest; where its tokens stand does not matter."""
    transformer = dit.flux_transformer(num_layers=1, num_single_layers=1)
    ids = torch.cat([torch.cartesian_prod(*map(torch.arange, n)) for n in ((1, 4, 2), (1, 2, 3))])
    ids[:8, 0] = 1
    given = dict(
        hidden_states=torch.randn(1, 14, 16),
        encoder_hidden_states=dit.text_tokens(3),
        pooled_projections=torch.zeros(1, 8),
        timestep=torch.tensor([0.5]),
        guidance=torch.ones(1),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
    )

    @torch.no_grad()
    def go():
        transformer(**given)

    calls = capture_calls(transformer, go, KINDS)
    with i2am.patch_transformer(transformer, num_steps=1, time_groups=1) as tracer:
        go()
    truth = Truth(generated(calls, (2, 3), slice(11, 17)), keys=slice(3, 11), groups=[0], reference_grid=(4, 2))
    check(tracer.maps(), truth, 1)
    with i2am.patch_transformer(transformer, num_steps=2, time_groups=2) as tracer:
        go()
        given["timestep"] = torch.tensor([0.25])  # the same latents again, and no second half of guidance
        go()
    assert set(map(tuple, tracer.maps().counts().values())) == {(1, 1)}


def test_long_pictures_in_bfloat16():
    """It counts to 256 only; so do the position ids of a pipeline that runs in it."""
    ids = torch.cartesian_prod(*map(torch.arange, (1, 40, 30))).bfloat16()
    assert Positions().segments(ids) == [(0, Segment(0, (40, 30)))]


def test_unknown_transformers_and_descriptions_are_refused():
    with pytest.raises(ValueError, match=r"need no description: got Concatenated"):
        i2am.patch_transformer(dit.flux_transformer(), reference=i2am.Concatenated())
    with pytest.raises(ValueError, match=r"does not know where DiTTransformer2DModel keeps.*i2am\.patch_modules"):
        i2am.patch_transformer(
            diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1)
        )


def test_kontext_without_an_image_is_refused_before_the_model_runs():
    pipe = dit.flux()
    ran = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: ran.append(1))
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        pipe(width=16, height=16, max_area=256, num_inference_steps=1, **dit.flux_prompt())
    assert not ran


# --------------------------------------------------------------------------------------------------------- FLUX.2


def flux2(pipe, sizes=((128, 64), (64, 96)), steps=4, **options):
    images = [pipelines.image(size, seed=i) for i, size in enumerate(sizes)]
    common = dict(prompt_embeds=dit.text_tokens(5)) | options
    return lambda: (
        pipe(
            image=images or None,
            width=96,
            height=64,
            num_inference_steps=steps,
            generator=generator(),
            output_type="np",
            **common,
        ).images
    )


REFERENCES = {"reference_0": (slice(29, 61), (4, 8)), "reference_1": (slice(61, 85), (6, 4))}


@pytest.mark.parametrize("build", [dit.flux2, dit.flux2_klein], ids=["flux2", "klein"])
@support.family(*FLUX2)
def test_flux2_keeps_its_references_apart(build):
    pipe = build()
    guided = build is dit.flux2_klein
    images = 1 + guided
    given = dict(negative_prompt_embeds=dit.text_tokens(5, seed=3), num_images_per_prompt=images) if guided else {}
    go = flux2(pipe, **given)
    calls = capture_calls(pipe.transformer, go, KINDS)
    evaluations = range(0, 8, 2) if guided else range(4)
    assert {c.evaluation for c in calls} == set(range(8 if guided else 4))
    maps = traced(pipe, go)
    assert maps.references == list(REFERENCES)
    groups = [0] * 4 + [1] * 4 if guided else [0, 0, 1, 1]
    for name, (keys, grid) in REFERENCES.items():
        chosen = generated(calls, (4, 6), slice(5, 29), evaluations=evaluations)
        truth = Truth(chosen, keys=keys, groups=groups, reference_grid=grid)
        check(maps, truth, 2, reference=name)
        assert maps.ulam("g2r", reference=name).shape == (images, *grid)
    with pytest.raises(ValueError, match="several references"):
        maps.ulam("r2g")


@support.family(*FLUX2)
def test_klein_inpainting():
    """The picture to be inpainted is a reference too: the first one."""
    pipe = dit.flux2(diffusers.Flux2KleinInpaintPipeline)

    def go():
        return pipe(
            image=pipelines.image((96, 64)),
            mask_image=pipelines.mask((96, 64)),
            image_reference=pipelines.image((64, 96), seed=1),
            prompt_embeds=dit.text_tokens(5),
            negative_prompt_embeds=dit.text_tokens(5, seed=3),
            width=96,
            height=64,
            strength=0.5,
            num_inference_steps=8,
            generator=generator(),
            output_type="np",
        ).images

    calls = capture_calls(pipe.transformer, go, KINDS)
    assert calls[-1].evaluation + 1 == 8
    chosen = generated(calls, (4, 6), slice(5, 29), evaluations=range(0, 8, 2))
    maps = traced(pipe, go)
    parts = {"reference_0": (slice(29, 53), (4, 6)), "reference_1": (slice(53, 77), (6, 4))}
    assert maps.references == list(parts)
    for name, (keys, grid) in parts.items():
        truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4, reference_grid=grid)
        check(maps, truth, 2, reference=name)


@support.family("FLUX.2 Klein with KV cache", "Flux2KleinKVPipeline", "in context, then in the KV cache")
def test_klein_kv_looks_at_itself_too():
    """``mode="self"``: the generated tokens' keys stand behind the references', cached or not."""
    pipe = dit.flux2_klein_kv()
    go = flux2(pipe)
    calls = capture_calls(pipe.transformer, go, KINDS)
    truth = Truth(
        generated(calls, (4, 6), slice(5, 29)), keys=slice(61, 85), groups=[0, 0, 1, 1], reference_grid=(4, 6)
    )
    maps = traced(pipe, go, mode="self")
    assert maps.references == ["self"]
    check(maps, truth, 2)


@pytest.mark.parametrize("images", [1, 2])
@support.family("FLUX.2 Klein with KV cache", "Flux2KleinKVPipeline", "in context, then in the KV cache")
def test_klein_kv_reads_references_from_the_cache(images):
    pipe = dit.flux2_klein_kv()
    go = flux2(pipe, num_images_per_prompt=images)
    calls = capture_calls(pipe.transformer, go, KINDS)
    lengths = {(c.evaluation, c.nth): (c.q.shape[2], c.k.shape[2]) for c in calls}
    assert lengths[0, 0] == (29, 85)  # [text, generated] → [text, references, generated]
    assert lengths[0, 1] == (56, 56)  # the references among themselves
    assert lengths[1, 0] == (29, 85)  # their keys from the cache
    maps = traced(pipe, go)
    offsets = {"reference_0": slice(5, 37), "reference_1": slice(37, 61)}
    for name, keys in offsets.items():
        grid = REFERENCES[name][1]
        truth = Truth(generated(calls, (4, 6), slice(5, 29)), keys=keys, groups=[0, 0, 1, 1], reference_grid=grid)
        check(maps, truth, 2, reference=name)
    assert set(map(tuple, maps.counts("reference_1").values())) == {(2, 2)}


def test_patches_through_the_cache():
    pipe = dit.flux2_klein_kv()
    go = flux2(pipe)
    calls = [c for c in capture_calls(pipe.transformer, go, KINDS) if c.nth == 0]
    rows = torch.stack([(c.q.double() @ c.k.double().mT / 4).softmax(-1)[:, :, 5 + 1 * 6 + 2] for c in calls])
    with i2am.trace(pipe, record="qk", sram={"eye": (20, 40)}) as tracer:  # pixels, of tokens of 16
        go()
    for name, keys, grid in (("reference_0", slice(5, 37), (4, 8)), ("reference_1", slice(37, 61), (6, 4))):
        truth = rows[..., keys].mean((0, 2)).reshape(1, *grid)
        assert_peak(tracer.maps().sram("eye", reference=name), truth)
        assert_peak(tracer.maps().sram((20, 40), reference=name), truth)


def test_klein_kv_cache_from_before_tracing_is_refused():
    pipe = dit.flux2_klein_kv()
    tracers = []

    def begin(pipe, step, timestep, given):
        if not tracers:
            tracers.append(i2am.trace(pipe))
        return given

    with pytest.raises(ValueError, match="56 reference tokens that were put there before tracing"):
        flux2(pipe, callback_on_step_end=begin)()
    tracers[0].unpatch()


def test_flux2_without_references_is_refused():
    with i2am.trace(pipe := dit.flux2()), pytest.raises(ValueError, match="no reference image among its tokens"):
        flux2(pipe, sizes=())()


# ------------------------------------------------------------------------------------------------------------ Qwen


@pytest.fixture
def small_qwen(monkeypatch):
    """Qwen resizes every reference to a megapixel; here to 32² pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint as inpaint
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    calculate = edit.calculate_dimensions

    def dimensions(area, ratio):
        scaled = calculate(32 * 32 * 64, ratio)  # multiples of 32
        return tuple(n if n is None else n // 8 for n in scaled)

    monkeypatch.setattr(edit, "calculate_dimensions", dimensions)
    monkeypatch.setattr(inpaint, "calculate_dimensions", dimensions)
    monkeypatch.setattr(plus, "calculate_dimensions", lambda area, ratio: dimensions(area, ratio)[:2])


def qwen(pipe, image, **options):
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])  # two tokens of padding
    common = dict(prompt_embeds=dit.text_tokens(7), prompt_embeds_mask=mask) | options
    return lambda: (
        pipe(
            image=image,
            width=24,
            height=16,
            generator=generator(),
            output_type="np",
            **({"num_inference_steps": 4} | common),
        ).images
    )


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("several", [False, True], ids=["edit", "plus"])
@support.family(*QWEN)
def test_qwen_edit(small_qwen, several, guided):
    pipe = dit.qwen(*([dit.QwenImageEditPlusPipeline] if several else []))
    images = [pipelines.image((64, 32)), pipelines.image((32, 32), seed=1)] if several else pipelines.image((64, 32))
    negative = dict(negative_prompt_embeds=dit.text_tokens(4, seed=3), negative_prompt_embeds_mask=None)
    two = {"num_images_per_prompt": 2} if several else {}
    go = qwen(pipe, images, **two, **(negative | {"true_cfg_scale": 3.0} if guided else {}))
    calls = capture_calls(pipe.transformer, go, ("attn",))
    if guided:  # the negative prompt is shorter
        assert {c.k.shape[2] for c in calls if c.evaluation % 2} == {
            c.k.shape[2] - 3 for c in calls if not c.evaluation % 2
        }
    maps = traced(pipe, go)
    grids = {n: tuple(maps.ulam("g2r", reference=n).shape[1:]) for n in maps.references}
    assert list(grids.values()) == ([(6, 11), (8, 8)] if several else [(6, 11)])
    start = 7 + 24
    evaluations = range(0, 8, 2) if guided else range(4)
    groups = [0] * 4 + [1] * 4 if guided else [0, 0, 1, 1]
    assert len(maps.references) == maps.batch == 1 + several
    for name in maps.references:
        grid = grids[name]
        keys = slice(start, start + grid[0] * grid[1])
        start = keys.stop
        chosen = generated(calls, (4, 6), slice(7, 31), evaluations=evaluations)
        check(maps, Truth(chosen, keys=keys, groups=groups, reference_grid=grid), 2, reference=name)
    assert start == calls[0].k.shape[2]


QWEN_SHAPES = {
    "layers": ([[(2, 2, 3), (1, 2, 2)]], r"\(2, 2, 3\).*2 layers have no one grid"),
    "tokens": ([[(1, 2, 3), (1, 2, 3)]], "make 12 tokens, but hidden_states has 10"),
    "batch": ([[(1, 2, 3), (1, 2, 2)], [(1, 3, 2), (1, 2, 2)]], "img_shapes differ within the batch"),
}


@pytest.mark.parametrize("case", QWEN_SHAPES)
def test_shapes_that_no_map_fits_are_refused(case):
    shapes, message = QWEN_SHAPES[case]
    transformer, n = dit.qwen().transformer, len(shapes)
    given = dict(hidden_states=torch.randn(n, 10, 16), timestep=torch.full((n,), 0.5), img_shapes=shapes)
    with i2am.patch_transformer(transformer, num_steps=1), pytest.raises(ValueError, match=message):
        transformer(encoder_hidden_states=dit.text_tokens(3, batch=n), **given)


@support.family(*QWEN)
def test_qwen_edit_inpainting(small_qwen):
    """The picture keeps its shape, whatever width and height say."""
    pipe = dit.qwen(diffusers.QwenImageEditInpaintPipeline)
    negative = dict(negative_prompt_embeds=dit.text_tokens(4, seed=3))
    picture, mask = pipelines.image((64, 32)), pipelines.mask((64, 32))
    go = qwen(pipe, picture, mask_image=mask, strength=0.5, num_inference_steps=8, **negative)
    calls = capture_calls(pipe.transformer, go, ("attn",))
    assert calls[-1].evaluation + 1 == 8
    chosen = generated(calls, (6, 11), slice(7, 73), evaluations=range(0, 8, 2))
    truth = Truth(chosen, keys=slice(73, 139), groups=[0] * 4 + [1] * 4, reference_grid=(6, 11))
    check(traced(pipe, go), truth, 2)


# ----------------------------------------------------------------------------------------------- LongCat, DreamLite


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family("LongCat-Image-Edit", "LongCatImageEditPipeline", "tokens in context")
def test_longcat_edit(guided, monkeypatch):
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as edit

    calculate = edit.calculate_dimensions  # a megapixel; here 32² pixels
    monkeypatch.setattr(edit, "calculate_dimensions", lambda *given: [int(n) // 64 * 2 for n in calculate(*given)])
    pipe = dit.longcat()

    def go():
        return pipe(
            pipelines.image((40, 32)),
            prompt="x",
            negative_prompt="",
            guidance_scale=3.0 if guided else 1.0,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).images

    calls = capture_calls(pipe.transformer, go, ("LongCatImageAttention",))
    n = calls[0].q.shape[2] - 4
    maps = traced(pipe, go)
    h, w = maps.ulam("r2g").shape[1:]
    assert 2 * h * w == n
    assert w > h  # 40×32 pixels
    chosen = generated(calls, (h, w), slice(4, 4 + n // 2), evaluations=range(0, 8, 2) if guided else range(4))
    groups = [0] * 4 + [1] * 4 if guided else [0, 0, 1, 1]
    check(maps, Truth(chosen, keys=slice(4 + n // 2, None), groups=groups, reference_grid=(h, w)), 2)


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
    with i2am.trace(pipe, time_groups=2, output="model") as tracer:
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
        check(maps, truth, 2, layers=layer)


@pytest.mark.parametrize("mobile", [False, True], ids=["guided", "mobile"])
def test_dreamlite_without_an_image_is_refused(mobile):
    """Its right half is zeros then."""
    pipe = dit.dreamlite(mobile)
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        pipe(prompt="x", width=32, height=24, num_inference_steps=1, output_type="np")


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family("Bria Fibo Edit", "BriaFiboEditPipeline", "tokens in context, several references")
def test_fibo_edit(guided):
    """[uncond, cond] in one batch, references numbered from 1, padding masked."""
    pipe = dit.fibo()
    sizes = ((64, 32), (48, 80))

    def go():
        return pipe(
            prompt='{"edit_instruction": "x"}',
            image=[pipelines.image(size, seed=i) for i, size in enumerate(sizes)],
            width=96,
            height=64,
            guidance_scale=3.0 if guided else 1.0,
            num_images_per_prompt=2,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).images

    calls = capture_calls(pipe.transformer, go, ("BriaFiboAttention",))
    assert calls[0].q.shape[0] == (4 if guided else 2)
    assert (calls[0].mask is not None) == guided
    maps = traced(pipe, go)
    assert maps.references == ["reference_0", "reference_1"]
    start = 5 + 24
    for name, (width, height) in zip(maps.references, sizes, strict=True):
        grid = (height // 16, width // 16)
        keys = slice(start, start + grid[0] * grid[1])
        start = keys.stop
        truth = Truth(
            generated(calls, (4, 6), slice(5, 29)),
            samples=slice(-2, None),
            keys=keys,
            groups=[0, 0, 1, 1],
            reference_grid=grid,
        )
        check(maps, truth, 2, reference=name)
    assert start == calls[0].k.shape[2]
    with i2am.patch_transformer(pipe.transformer, time_groups=2) as tracer:  # which tells the time by timesteps alone
        go()
    assert [sum(n) > 0 for n in zip(*tracer.maps().counts("reference_0").values(), strict=True)] == [True, True]
