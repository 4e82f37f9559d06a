"""Flux (Kontext, IP-Adapters, Redux), LongCat and Fibo against a materialised recomputation from the untraced run."""

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import check_parts, generator, run, traced
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak
from tests.support_table import check

KONTEXT = "FLUX.1 Kontext", "FluxKontextPipeline, FluxKontextInpaintPipeline", "tokens in context"
KINDS = ("FluxAttention",)
FLUX = dict(width=24, height=16)


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
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
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


def test_kontext_without_an_image_is_refused_before_the_model_runs():
    pipe = dit.flux()
    ran = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: ran.append(1))
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        pipe(width=16, height=16, max_area=256, num_inference_steps=1, **dit.flux_prompt())
    assert not ran


# ----------------------------------------------------------------------------------------------------- IP-Adapters


def embeds(count=1, seed=3):
    return torch.randn(1, count, 12, generator=torch.Generator().manual_seed(seed))


@support.family("FLUX.1 IP-Adapter", "FluxPipeline, FluxKontextPipeline", "a call of each adapter's own")
def test_flux_ip_adapters():
    """Queries before RoPE, a call for each adapter, on the double blocks alone."""
    pipe = prompts.flux_ip(4, 6)
    go = run(
        pipe,
        ip_adapter_image_embeds=[embeds(), embeds(2)],
        negative_ip_adapter_image_embeds=[embeds(seed=5), embeds(2, seed=6)],
        true_cfg_scale=2.0,
        **FLUX,
        **dit.flux_prompt(),
        **dit.flux_prompt(seed=3, prefix="negative_"),
    )
    calls = [c for c in capture_calls(pipe.transformer, go, ("FluxAttention",)) if "single" not in c.layer]
    maps = traced(pipe, go)
    assert maps.references == ["ip_adapter_0", "ip_adapter_1.image_0", "ip_adapter_1.image_1"]
    assert maps.layers == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    parts = {"ip_adapter_0": (1, slice(0, 4)), "ip_adapter_1.image_0": (2, slice(0, 6))}
    parts["ip_adapter_1.image_1"] = (2, slice(6, 12))
    for name, (nth, keys) in parts.items():
        chosen = generated(calls, (4, 6), nth=nth, evaluations=range(0, 8, 2))
        truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4)
        check(maps, truth, 2, reference=name, directions=("r2g", "mass") if nth == 2 else ("r2g",))
        with pytest.raises(ValueError, match="no 2-D layout"):
            maps.ulam("g2r", reference=name)


def test_flux_ip_adapter_beside_a_kontext_reference():
    pipe = prompts.flux_ip(4, pipeline=diffusers.FluxKontextPipeline)
    go = run(
        pipe,
        image=pipelines.image((32, 16)),
        max_area=24 * 16,
        _auto_resize=False,
        ip_adapter_image_embeds=[embeds()],
        negative_ip_adapter_image_embeds=[embeds(seed=5)],
        **FLUX,
        **dit.flux_prompt(),
    )
    calls = capture_calls(pipe.transformer, go, ("FluxAttention",))
    maps = traced(pipe, go)
    assert maps.references == ["reference", "ip_adapter"]
    groups = [0, 0, 1, 1]
    context = Truth(generated(calls, (4, 6), slice(5, 29)), keys=slice(29, 61), groups=groups, reference_grid=(4, 8))
    check(maps, context, 2, reference="reference", directions=("r2g", "g2r", "mass"))
    adapter = Truth(generated(calls, (4, 6), slice(0, 24), nth=1), groups=groups)
    check(maps, adapter, 2, reference="ip_adapter", directions=("r2g",))


def test_flux_ip_adapter_is_no_part_of_itself():
    pipe = prompts.flux_ip(4)
    both = dict(ip_adapter_image_embeds=[embeds()], negative_ip_adapter_image_embeds=[embeds(seed=5)])
    go = run(pipe, **both, **FLUX, **dit.flux_prompt())
    calls = capture_calls(pipe.transformer, go, ("FluxAttention",))
    own = slice(5, 29)
    truth = Truth(generated(calls, (4, 6), own), keys=own, groups=[0, 0, 1, 1], reference_grid=(4, 6))
    maps = traced(pipe, go, mode="self")
    assert maps.references == ["self"]
    check(maps, truth, 2, directions=("r2g", "g2r", "mass"))


# ----------------------------------------------------------------------------------------------------------- Redux


FILL = dict(image=pipelines.image((24, 16)), mask_image=pipelines.mask((24, 16)))


@pytest.mark.parametrize("grid", [prompts.SIGLIP, None], ids=["grid", "no grid"])
@pytest.mark.parametrize("fill", [False, True], ids=["Flux", "Fill"])
@support.family("FLUX.1 Redux", "FluxPriorReduxPipeline → FluxPipeline, FluxFillPipeline", "behind the text tokens")
def test_flux_redux(grid, fill):
    prior, pipe = prompts.redux(*((diffusers.FluxFillPipeline, 3 * 16) if fill else ()))
    given = dict(prior(pipelines.image((30, 20))))
    assert given["prompt_embeds"].shape[1] == 512 + 9
    go = run(pipe, **given, **FLUX, **(FILL if fill else {}))
    with pytest.raises(ValueError, match="channels beside the latents" if fill else "draws from text alone"):
        i2am.trace(pipe)
    calls = capture_calls(pipe.transformer, go, ("FluxAttention",))
    maps = traced(pipe, go, reference=i2am.Reference(grid=grid, tokens=slice(-9, None), name="redux"))
    assert maps.references == ["redux"]
    truth = Truth(
        generated(calls, (4, 6), slice(521, 545)), keys=slice(512, 521), groups=[0, 0, 1, 1], reference_grid=grid
    )
    check(maps, truth, 2, directions=("r2g", "g2r", "mass") if grid else ("r2g", "mass"))


def test_redux_tokens_as_indices_and_a_wrong_description():
    prior, pipe = prompts.redux()
    go = run(pipe, **dict(prior(pipelines.image((30, 20)))), **FLUX)
    wanted = traced(pipe, go, reference=i2am.Reference(grid=(3, 3), tokens=slice(-9, None)))
    every = torch.zeros(521, dtype=torch.bool)
    every[512:] = True
    for tokens in (list(range(-9, 0)), every):
        with i2am.trace(pipe, reference=i2am.Reference(grid=(3, 3), tokens=tokens), time_groups=2) as tracer:
            go()
        torch.testing.assert_close(tracer.maps().ulam("g2r"), wanted.ulam("g2r"), rtol=1e-4, atol=1e-8)
    with i2am.trace(pipe, reference=i2am.Reference(grid=(27, 27), tokens=slice(-9, None))):
        with pytest.raises(ValueError, match="makes 729 tokens, but 9 of the 521 keys"):
            go()


# --------------------------------------------------------------------------------------------------- LongCat, Fibo


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
    parts = {"reference_0": (slice(29, 37), (2, 4)), "reference_1": (slice(37, 52), (5, 3))}  # sizes in tokens of 16
    assert calls[0].k.shape[2] == 52
    check_parts(maps, parts, generated(calls, (4, 6), slice(5, 29)), groups=[0, 0, 1, 1], samples=slice(-2, None))
    with i2am.patch_transformer(pipe.transformer, time_groups=2) as tracer:  # which tells the time by timesteps alone
        go()
    assert [sum(n) > 0 for n in zip(*tracer.maps().counts("reference_0").values(), strict=True)] == [True, True]


@support.family("Chroma with an IP-Adapter", "ChromaPipeline, -Img2Img, -Inpaint", "a call of the adapter's own")
def test_chroma_ip_adapter():
    pipe = prompts.chroma_ip(4)
    go = run(
        pipe,
        ip_adapter_image_embeds=[embeds()],
        negative_ip_adapter_image_embeds=[embeds(seed=5)],
        prompt_embeds=dit.text_tokens(5),
        prompt_attention_mask=torch.tensor([[1.0, 1, 1, 1, 0]]),
        negative_prompt_embeds=dit.text_tokens(5, seed=3),
        negative_prompt_attention_mask=torch.tensor([[1.0, 1, 0, 0, 0]]),
        **FLUX,
    )
    calls = [c for c in capture_calls(pipe.transformer, go, ("FluxAttention",)) if "single" not in c.layer]
    maps = traced(pipe, go)
    assert maps.references == ["ip_adapter"]
    chosen = generated(calls, (4, 6), nth=1, evaluations=range(0, 8, 2))
    check(maps, Truth(chosen, keys=slice(0, 4), groups=[0] * 4 + [1] * 4), 2, directions=("r2g",))


# ------------------------------------------------------------------------------------------------------ VisualCloze


def cloze_call(transformer, masks, heights=(4, 4)):
    """Rows of three pictures of 4×2 tokens each; ``masks``: which are to be generated, row by row."""
    own, text = 16, 5
    width = {"latents": own, "masked": own, "mask": transformer.config.in_channels - 2 * own}
    tokens, ids = [], []
    for row, (each, height) in enumerate(zip(masks, heights, strict=True), start=1):
        columns = torch.tensor(each).repeat_interleave(2)
        tokens.append(columns.repeat(height).float())
        ids.append(torch.cartesian_prod(torch.tensor([row]), torch.arange(height), torch.arange(len(columns))))
    mask = torch.cat(tokens)[None, :, None]
    content = torch.randn(1, mask.shape[1], 2 * own, generator=generator())
    hidden = torch.cat([content, mask.expand(-1, -1, width["mask"])], dim=-1)

    @torch.no_grad()
    def go():
        for t in (0.9, 0.7, 0.4, 0.1):
            out = transformer(
                hidden_states=hidden,
                encoder_hidden_states=dit.text_tokens(text),
                pooled_projections=torch.ones(1, 8),
                timestep=torch.tensor([t]),
                img_ids=torch.cat(ids).float(),
                txt_ids=torch.zeros(text, 3),
                guidance=torch.ones(1),
            ).sample
        return out

    return go


@support.family(
    "VisualCloze",
    "VisualClozeGenerationPipeline",
    "the given pictures of each row, tokens in context, several references",
)
def test_visualcloze():
    """An example of three pictures; below it a query of two, with the one to be generated between them."""
    transformer = dit.flux_transformer(in_channels=16 * 2 + 64)
    go = cloze_call(transformer, [(False, False, False), (False, True, False)])
    calls = capture_calls(transformer, go, KINDS)
    plain = go()
    with i2am.patch_transformer(transformer, num_steps=4, time_groups=2, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    at = 5 + 24 + torch.arange(24).reshape(4, 6)
    chosen = generated(calls, (4, 2), at[:, 2:4].flatten())
    parts = {"row_0": (slice(5, 29), (4, 6)), "row_1": (at[:, [0, 1, 4, 5]].flatten(), (4, 4))}
    check_parts(maps, parts, chosen, groups=[0, 0, 1, 1])
    with i2am.patch_transformer(transformer, num_steps=4, time_groups=2, text=True, itself=True) as tracer:
        go()
    shares = tracer.maps().budget().shares
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares.sum(-1)))


WRONG_GRIDS = {
    "several rows": ([(True, False), (False, True)], "several rows"),
    "nothing": ([(False, False), (False, False)], "no picture of the grid"),
}


@pytest.mark.parametrize("case", WRONG_GRIDS)
def test_grids_that_do_not_fit_are_refused(case):
    masks, said = WRONG_GRIDS[case]
    transformer = dit.flux_transformer(in_channels=16 * 2 + 64)
    with i2am.patch_transformer(transformer, num_steps=4), pytest.raises(ValueError, match=said):
        cloze_call(transformer, masks)()
    with i2am.patch_transformer(transformer, num_steps=4, mode="self"), pytest.raises(ValueError, match="each other"):
        cloze_call(transformer, masks)()
