"""GLIGEN: pictures in boxes, one token each among the keys of gated self-attention."""

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import GUIDED, run
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tiny_models import videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth

BOXES = 4


def model():
    unet = pipelines.unet(attention_type="gated-text-image")
    for parameter in unet.parameters():  # gates begin at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return unet


def boxes(filled):
    """Boxes of two samples, [unconditional, conditional]; ``filled``: which have a picture."""
    masks = torch.zeros(2, BOXES)
    masks[1, filled] = 1
    features = videos.noise(2, BOXES, pipelines.CONTEXT)
    return dict(
        boxes=videos.noise(2, BOXES, 4).sigmoid(),
        masks=masks,
        phrases_masks=masks.clone(),
        image_masks=masks,
        phrases_embeddings=features,
        image_embeddings=features + 1,
    )


def loop(unet, each):
    """``each``: the boxes that have a picture, of every step."""
    latents, context = videos.noise(1, 4, 8, 6), videos.noise(2, 5, pipelines.CONTEXT)

    @torch.no_grad()
    def go():
        for t, filled in zip((900, 700, 400, 100), each, strict=True):
            x = latents.repeat(2, 1, 1, 1) * t / 900
            out = unet(x, t, context, cross_attention_kwargs={"gligen": boxes(filled)}).sample
        return out

    return go


ROW = (
    "GLIGEN with pictures",
    "StableDiffusionGLIGENTextImagePipeline",
    "one token a box, in gated self-attention, several references",
)


@support.family(*ROW)
def test_gligen():
    unet = model()
    go = loop(unet, [[0, 2]] * 4)
    calls = capture_calls(unet, go, ("fuser.attn",))
    grids = {48: (8, 6), 12: (4, 3)}
    plain = go()
    with i2am.patch_unet(unet, num_steps=4, time_groups=2, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.references == ["reference_0", "reference_1"]
    chosen = []
    for own, grid in grids.items():
        here = [c for c in calls if c.q.shape[2] == own + 2 * BOXES]
        chosen += generated(here, grid, slice(0, own))
    chosen.sort(key=lambda c: c.evaluation)
    for name, box in (("reference_0", 0), ("reference_1", 2)):
        keys = slice(box - BOXES, box - BOXES + 1)  # the pictures come last
        truth = Truth(chosen, samples=GUIDED, keys=keys, groups=[0, 0, 1, 1])
        for layer in truth.layers:
            got = maps.ulam("r2g", layers=layer, reference=name)
            want = truth.ulam("r2g", names=[layer])
            assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()
        truth.maps = {layer: truth.maps[layer] for layer in maps.layers if "mid_block" not in layer}
        support.check(maps, truth, 2, reference=name, directions=("r2g", "mass"))


@support.family(*ROW)
def test_gligen_pipeline():
    """Two calls a step: one with its pictures in their boxes, and one on empty boxes, which does not count."""

    def feature(self, input, normalize_constant, device, is_image=False):
        return torch.ones(1, pipelines.CONTEXT) * (2.0 if is_image else 1.0)

    kind = diffusers.StableDiffusionGLIGENTextImagePipeline
    parts = {"vae": pipelines.vae(), "text_encoder": pipelines.text(), "tokenizer": pipelines.tokenizer()}
    parts |= dict.fromkeys(("processor", "image_encoder", "image_project", "safety_checker", "feature_extractor"))
    pipe = pipelines.quiet(
        type(kind.__name__, (kind,), {"get_clip_feature": feature})(
            **parts, unet=model(), scheduler=pipelines.ddim(), requires_safety_checker=False
        )
    )
    inputs = dict(
        prompt="a b",
        gligen_phrases=["a", "b"],
        gligen_images=[pipelines.image(), pipelines.image(seed=2)],
        gligen_boxes=[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]],
    )
    go = run(pipe, **inputs, width=32, height=32)
    calls = [c for c in capture_calls(pipe.unet, go, ("fuser.attn",)) if c.evaluation % 2 == 0]
    grids = {own: (side, side) for side in (2, 4, 8, 16) for own in [side * side]}
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        assert (go() == plain).all()
    maps = tracer.maps()
    assert maps.references == ["reference_0", "reference_1"]
    finest = [c for c in calls if c.q.shape[2] == max(c.q.shape[2] for c in calls)]
    own = finest[0].q.shape[2] - 60
    chosen = generated(finest, grids[own], slice(0, own))
    for box, name in enumerate(maps.references):
        keys = slice(box - 30, box - 29)
        truth = Truth(chosen, samples=GUIDED, keys=keys, groups=[0, 0, 0, 0, 1, 1, 1, 1])
        support.check(maps, truth, 2, reference=name, directions=("r2g", "mass"), layers=truth.layers)


def test_empty_boxes_do_not_count():
    unet = model()
    go = loop(unet, [[1], [1], [], []])
    with i2am.patch_unet(unet, num_steps=4, time_groups=2) as tracer:
        go()
    assert all(count == [2, 0] for count in tracer.maps().counts().values())
    with i2am.patch_unet(unet, num_steps=4) as tracer:
        loop(unet, [[]] * 4)()
    with pytest.raises(ValueError, match="the boxes are empty"):
        tracer.maps()
    with i2am.patch_unet(unet, num_steps=4), pytest.raises(ValueError, match="no pictures in boxes"):
        unet(torch.randn(1, 4, 8, 6), 900, torch.randn(1, 5, pipelines.CONTEXT))


def test_self_attention_beside_boxes():
    """``mode="self"`` means the picture's own attention, not the one with boxes."""
    unet = model()
    with i2am.patch_unet(unet, mode="self", num_steps=4) as tracer:
        loop(unet, [[1]] * 4)()
    assert all(layer.endswith("attn1") for layer in tracer.maps().layers)
