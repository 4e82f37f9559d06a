"""Kandinsky 2.1 and 2.2 against a materialised recomputation from the untraced run."""

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import run, traced
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
