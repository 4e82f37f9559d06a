"""UNets whose cross-attention carries the reference against a materialised recomputation from the untraced run."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import GUIDED, check_levels, denoise, run_at
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.truth import Truth, assert_peak, capture


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


@support.family("Paint-by-Example", "PaintByExamplePipeline", "one CLIP token")
def test_paint_by_example():
    pipe = pipelines.paint_by_example()
    size = (40, 32)
    go = run_at(
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
    go = run_at(pipe, image=pipelines.image())
    truth = Truth(capture(pipe.unet, go), samples=GUIDED, groups=[0, 0, 1, 1])
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    check_levels(tracer.maps(), truth, 2, directions=("r2g",))


@support.family("Versatile Diffusion", "VersatileDiffusionImageVariationPipeline", "CLIP's class token and patches")
def test_versatile_image_variation():
    pipe = pipelines.versatile()
    go = run_at(pipe, size=(48, 32), image=pipelines.image())
    truth = Truth(
        capture(pipe.image_unet, go), samples=GUIDED, groups=[0, 0, 1, 1], reference_grid=pipelines.PATCHES, skip=1
    )
    with i2am.trace(pipe, time_groups=2) as tracer:
        go()
    check_levels(tracer.maps(), truth, 2)


class Tokenizer:
    def __call__(self, texts, **options):
        return SimpleNamespace(input_ids=torch.zeros(len(texts), 9))


class Encoder(torch.nn.Module):
    text_model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=9))

    def forward(self, input_ids, ctx_embeddings):
        return (torch.randn(1, 9, pipelines.CONTEXT, generator=torch.Generator().manual_seed(3)),)


def blip_diffusion():
    """What its Q-Former and text encoder would say is given: four tokens of the subject behind three of words."""
    kind = diffusers.BlipDiffusionPipeline

    def init(self, vae, unet, scheduler):
        super(kind, self).__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.tokenizer, self.text_encoder = Tokenizer(), Encoder()
        self.qformer = SimpleNamespace(config=SimpleNamespace(num_query_tokens=4))
        self.image_processor = SimpleNamespace(
            preprocess=lambda image, **options: {"pixel_values": torch.zeros(1, 3, 8, 8)},
            postprocess=lambda image, output_type: image.numpy(),
        )
        self.register_to_config(ctx_begin_pos=3, mean=None, std=None)

    def embed(self, *arguments):
        return torch.randn(1, 9, pipelines.CONTEXT, generator=torch.Generator().manual_seed(4))

    own = dict(__init__=init, get_query_embeddings=embed, encode_prompt=embed, _execution_device=torch.device("cpu"))
    own["maybe_free_model_hooks"] = lambda self: None
    parts = dict(vae=pipelines.vae(), unet=pipelines.unet(), scheduler=pipelines.ddim())
    return pipelines.quiet(type("BlipDiffusionPipeline", (kind,), own)(**parts))


@support.family("BLIP-Diffusion", "BlipDiffusionPipeline", "the subject's tokens, among the words")
def test_blip_diffusion():
    pipe = blip_diffusion()

    def go():
        options = dict(height=16, width=12, num_inference_steps=4, generator=torch.Generator().manual_seed(7))
        return pipe(["a cup"], None, ["cup"], ["cup"], **options).images

    calls = capture(pipe.unet, go)
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        assert (go() == plain).all()
    maps = tracer.maps()
    assert maps.references == ["subject"]
    truth = Truth(calls, samples=GUIDED, keys=slice(3, 7), groups=[0, 0, 1, 1])
    check_levels(maps, truth, 2, directions=("r2g", "mass"))
