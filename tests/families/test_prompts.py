"""Images as prompts: Flux and SD3 IP-Adapters, Redux, Kandinsky 2.2, SVD, against a materialised recomputation."""

import functools

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak


def generator():
    return torch.Generator().manual_seed(7)


check = functools.partial(support.check, directions=("r2g",))


def run(pipe, **kwargs):
    common = dict(num_inference_steps=4, output_type="np")
    return lambda: pipe(generator=generator(), **(common | kwargs)).images


def traced(pipe, go, strip=1, **options):
    """Maps of ``go()``, which tracing does not change."""
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", **options) as tracer:
        assert (go() == plain).all()
    assert (go() == plain).all()
    with i2am.trace(pipe, time_groups=2, **options):
        assert abs(go() - plain).max() < 1e-3
    canvas = (strip * plain.shape[-3], plain.shape[-2])
    assert tracer.maps().canvas == canvas  # pixels of the picture, or of latent frames below each other
    return tracer.maps()


FLUX = dict(width=24, height=16)


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
    check(maps, adapter, 2, reference="ip_adapter")


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


def sd3_inputs(guided):
    common = dict(
        prompt_embeds=dit.text_tokens(5),
        negative_prompt_embeds=dit.text_tokens(5, seed=1),
        pooled_prompt_embeds=torch.ones(1, 8),
        negative_pooled_prompt_embeds=torch.zeros(1, 8),
        width=24,
        height=32,
        guidance_scale=4.0 if guided else 1.0,
    )
    return common | dict(ip_adapter_image=pipelines.image())


@pytest.mark.parametrize("guided", [True, False])
@support.family("SD3 IP-Adapter", "StableDiffusion3Pipeline", "behind the image's own keys (resampled)")
def test_sd3_ip_adapter(guided):
    pipe = prompts.sd3()
    go = run(pipe, **sd3_inputs(guided))
    calls = capture_calls(pipe.transformer, go, ("attn",))
    assert calls[1].k.shape[2] == 8 * 6 + 6  # the image's own tokens, then the resampled ones
    truth = Truth(
        generated(calls, (8, 6), nth=1),
        samples=slice(1, 2) if guided else slice(0, 1),
        keys=slice(48, 54),
        groups=[0, 0, 1, 1],
    )
    maps = traced(pipe, go)
    assert maps.references == ["ip_adapter"]
    assert maps.canvas == (32, 24)
    check(maps, truth, 2, directions=("r2g", "mass"))


@support.family("SD3 IP-Adapter", "StableDiffusion3Pipeline", "behind the image's own keys (resampled)")
def test_sd3_skip_layer_guidance():
    """A third evaluation of a step, of the conditional half alone: it does not count."""
    pipe = prompts.sd3()
    slg = dict(skip_guidance_layers=[0], skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=1.0)
    go = run(pipe, **sd3_inputs(True), **slg)
    calls = capture_calls(pipe.transformer, go, ("attn",))
    assert [c.q.shape[0] for c in calls if c.layer.startswith("transformer_blocks.1") and c.nth == 1] == [2, 1] * 4
    chosen = generated(calls, (8, 6), nth=1, evaluations=range(0, 8, 2))
    truth = Truth(chosen, samples=slice(1, 2), keys=slice(48, 54), groups=[0] * 4 + [1] * 4)
    check(traced(pipe, go), truth, 2, directions=("r2g", "mass"))


def test_sd3_without_adapter_and_itself():
    pipe = prompts.sd3(adapter=False, dual_attention_layers=(0,))  # as SD 3.5 medium's: a second one, without text
    with pytest.raises(ValueError, match="draws from text alone"):
        i2am.trace(pipe)
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        i2am.patch_transformer(pipe.transformer)
    inputs = sd3_inputs(True)
    inputs.pop("ip_adapter_image")
    go = run(pipe, **inputs)
    calls = capture_calls(pipe.transformer, go, ("attn",))
    own = slice(0, 48)
    truth = Truth(
        generated(calls, (8, 6), own), samples=slice(1, 2), keys=own, groups=[0, 0, 1, 1], reference_grid=(8, 6)
    )
    maps = traced(pipe, go, mode="self")
    assert maps.references == ["self"]
    check(maps, truth, 2, directions=("r2g", "g2r", "mass"))


KANDINSKY = {
    "text2img": (diffusers.KandinskyV22Pipeline, 4, {}),
    "img2img": (diffusers.KandinskyV22Img2ImgPipeline, 4, {"image": pipelines.image((24, 32)), "strength": 0.5}),
    "inpaint": (
        diffusers.KandinskyV22InpaintPipeline,
        9,
        {"image": pipelines.image((24, 32)), "mask_image": pipelines.mask((24, 32))},
    ),
}


@pytest.mark.parametrize("kind", KANDINSKY)
@support.family("Kandinsky 2.2", "KandinskyV22Pipeline, -Img2Img, -Inpaint", "before the layer's own keys (pooled)")
def test_kandinsky_22(kind):
    pipeline, channels, inputs = KANDINSKY[kind]
    pipe = prompts.kandinsky(pipeline, channels)
    go = run(
        pipe,
        image_embeds=torch.ones(1, 12),
        negative_image_embeds=torch.zeros(1, 12),
        **({"width": 24, "height": 32} | inputs),
    )
    calls = capture_calls(pipe.unet, go, ("Attention",))
    evaluations = calls[-1].evaluation + 1
    assert evaluations == (2 if kind == "img2img" else 4)
    n = {c.q.shape[2]: c.k.shape[2] for c in calls}
    assert all(keys - own == 32 for own, keys in n.items())
    grids = {48: (8, 6), 12: (4, 3)}
    if kind == "img2img":  # diffusers 0.42 hands width and height to its preprocessor the wrong way round
        grids = {n: grid[::-1] for n, grid in grids.items()}
    T = 2
    groups = [e * T // evaluations for e in range(evaluations)]
    truth = Truth(
        generated(calls, lambda c: grids[c.q.shape[2]]), samples=slice(1, 2), keys=slice(0, 32), groups=groups
    )
    maps = traced(pipe, go)
    assert maps.references == ["image"]
    check(maps, truth, T, directions=("r2g", "mass"))
    with pytest.raises(ValueError, match="no 2-D layout"):
        maps.ulam("g2r")


def test_kandinsky_itself():
    pipe = prompts.kandinsky()
    go = run(pipe, image_embeds=torch.ones(1, 12), negative_image_embeds=torch.zeros(1, 12), width=24, height=32)
    calls = capture_calls(pipe.unet, go, ("Attention",))
    finest = [c for c in calls if c.q.shape[2] == 48]
    truth = Truth(
        generated(finest, (8, 6)), samples=slice(1, 2), keys=slice(32, None), groups=[0, 0, 1, 1], reference_grid=(8, 6)
    )
    maps = traced(pipe, go, mode="self")
    for layer in truth.layers:
        for direction in ("r2g", "g2r", "mass"):
            assert_peak(maps.ulam(direction, layers=layer), truth.ulam(direction, names=[layer]))


def test_kandinsky_21_has_its_image_before_its_text():
    """The UNet alone: ten pooled image tokens, then the text's."""
    torch.manual_seed(0)
    unet = prompts.kandinsky().unet
    projection = diffusers.models.embeddings.TextImageProjection(20, 12, 12, num_image_text_embeds=10)
    unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = projection.eval(), "text_image_proj"
    given = dict(encoder_hidden_states=torch.randn(1, 7, 20), added_cond_kwargs={"image_embeds": torch.randn(1, 12)})
    latents = torch.randn(1, 4, 8, 6)

    @torch.no_grad()
    def go():
        return unet(latents, 500, **given).sample

    calls = capture_calls(unet, go, ("Attention",))
    assert calls[0].k.shape[2] == 10 + 7 + calls[0].q.shape[2]
    grids = {48: (8, 6), 12: (4, 3)}
    truth = Truth(generated(calls, lambda c: grids[c.q.shape[2]]), keys=slice(0, 10), groups=[0])
    with i2am.patch_unet(unet, num_steps=1, time_groups=1) as tracer:
        go()
    check(tracer.maps(), truth, 1, directions=("r2g", "mass"))
    unet.config.encoder_hid_dim_type = "text_proj"
    with pytest.raises(ValueError, match=r"'text_proj': describe it with reference=i2am\.Reference"):
        i2am.patch_unet(unet)


@pytest.mark.parametrize("videos", [1, 2])
@support.family("Stable Video Diffusion", "StableVideoDiffusionPipeline", "one CLIP token; frames are the batch")
def test_stable_video_diffusion(videos):
    """Frames are images of the batch; the one CLIP token leaves R2G alone."""
    pipe = prompts.svd()
    frames = 3 * videos

    def go():
        return pipe(
            pipelines.image((32, 32)),
            width=24,
            height=32,
            num_frames=3,
            num_videos_per_prompt=videos,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).frames

    calls = capture_calls(pipe.unet, go, ("attn2",))
    spatial = [c for c in calls if "temporal" not in c.layer]
    assert spatial
    assert spatial[0].q.shape[0] == 2 * frames
    grids = {192: (16, 12), 48: (8, 6)}
    truth = Truth(
        generated(spatial, lambda c: grids[c.q.shape[2]]), samples=slice(frames, 2 * frames), groups=[0, 0, 1, 1]
    )
    maps = traced(pipe, go)
    assert maps.batch == frames
    assert maps.ulam("r2g").shape == (frames, 16, 12)
    check(maps, truth, 2)
    with pytest.raises(ValueError, match="identically 1"):
        maps.ulam("g2r")
    with i2am.patch_unet(pipe.unet, reference=i2am.Reference(), num_steps=4) as bare:
        go()
    assert bare.maps().batch == frames  # guidance by its repeated latents, the image's channels aside
    with pytest.raises(ValueError, match="goes over frames"):
        i2am.trace(pipe, mode="self")


@pytest.mark.parametrize("last", [False, True], ids=["first", "first and last"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family(
    "Wan image-to-video", "WanImageToVideoPipeline", "CLIP's tokens, in a call of their own; frames as a strip"
)
def test_wan_image_to_video(guided, last):
    pipe = prompts.wan(last_image=last)

    def go():
        return pipe(
            pipelines.image((48, 32)),
            last_image=pipelines.image((48, 32), seed=1) if last else None,
            prompt_embeds=dit.text_tokens(512),
            negative_prompt_embeds=dit.text_tokens(512, seed=3),
            width=48,
            height=32,
            num_frames=9,
            guidance_scale=3.0 if guided else 1.0,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).frames

    images = 1 + last
    calls = [c for c in capture_calls(pipe.transformer, go, ("attn2",)) if c.k.shape[2] == 10 * images]
    assert {c.nth for c in calls} == {0}
    strip = (3 * 2, 3)  # three latent frames of 2×3 tokens
    maps = traced(pipe, go, strip=3)
    with i2am.patch_transformer(pipe.transformer, num_steps=4) as bare:
        go()
    assert bare.maps().references == maps.references
    assert maps.references == (["reference_0", "reference_1"] if last else ["reference"])
    for i, name in enumerate(maps.references):
        truth = Truth(
            generated(calls, strip, evaluations=range(0, 8, 2) if guided else range(4)),
            keys=slice(10 * i, 10 * i + 10),
            groups=[0] * 4 + [1] * 4 if guided else [0, 0, 1, 1],
            reference_grid=(3, 3),
            skip=1,
        )
        check(maps, truth, 2, directions=("r2g", "g2r", "mass") if last else ("r2g", "g2r"), reference=name)


def test_wan_without_image_keys_is_refused():
    pipe = prompts.wan(image_keys=False)
    with pytest.raises(ValueError, match="channels beside the latents"):
        i2am.trace(pipe)
    with pytest.raises(ValueError, match="channels beside the latents"):
        i2am.patch_transformer(pipe.transformer)
    with pytest.raises(ValueError, match="goes over frames"):
        i2am.patch_transformer(pipe.transformer, mode="self")
