"""Kandinsky 2.1, 2.2 and UnCLIP against a materialised recomputation from the untraced run."""

import diffusers
import pytest
import torch
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

import i2am
from tests import support_table as support
from tests.helpers.families import GUIDED, generator, run, traced
from tests.helpers.tiny_models import prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak
from tests.support_table import check

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


def unclip():
    torch.manual_seed(0)
    decoder = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
        norm_num_groups=8,
    ).eval()
    enlarge = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
    ).eval()
    projection = UnCLIPTextProjModel(
        clip_extra_context_tokens=3, clip_embeddings_dim=12, time_embed_dim=128, cross_attention_dim=12
    ).eval()

    def encode(self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, **options):
        mask = torch.tensor([[True, True, False, False, False], [True, True, True, False, False]])
        return torch.randn(2, 12, generator=generator()), torch.randn(2, 5, 12, generator=generator()), mask

    def picture(self, image, device, num_images_per_prompt, image_embeddings):
        return image_embeddings

    own = {"_encode_prompt": encode, "_encode_image": picture}
    kind = type("UnCLIPImageVariationPipeline", (diffusers.UnCLIPImageVariationPipeline,), own)
    scheduler = dict(variance_type="learned_range", prediction_type="epsilon", num_train_timesteps=1000)
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "image_encoder"))
    return pipelines.quiet(
        kind(
            decoder=decoder,
            text_proj=projection,
            super_res_first=enlarge,
            super_res_last=enlarge,
            decoder_scheduler=diffusers.UnCLIPScheduler(**scheduler),
            super_res_scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log"),
            **nothing,
        )
    )


@support.family(
    "UnCLIP image variation", "UnCLIPImageVariationPipeline: its decoder", "before the text and the layer's own keys"
)
def test_unclip():
    """The image's three tokens come before five of text, two or three of which are not masked; then the layer's own."""
    pipe = unclip()

    def go():
        return pipe(
            image_embeddings=torch.ones(1, 12),
            decoder_num_inference_steps=4,
            super_res_num_inference_steps=2,
            decoder_guidance_scale=3.0,
            generator=generator(),
            output_type="np",
        ).images

    calls = capture_calls(pipe.decoder, go, ("Attention",))
    assert {c.evaluation for c in calls} == set(range(4))
    grids = {16: (4, 4), 64: (8, 8)}
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        assert (go() == plain).all()
    chosen = generated(calls, lambda c: grids[c.q.shape[2]])
    truth = Truth(chosen, samples=GUIDED, keys=slice(0, 3), groups=[0, 0, 1, 1])
    assert tracer.maps().references == ["image"]
    check(tracer.maps(), truth, 2, directions=("r2g", "mass"))
