"""Qwen-Image-Edit and -Plus against a materialised recomputation from the untraced run."""

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import generator, traced
from tests.helpers.tiny_models import dit
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check

QWEN = (
    "Qwen-Image-Edit, -Plus",
    "QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageEditInpaintPipeline",
    "tokens in context, several references",
)


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


def test_a_record_leaves_the_model_its_own_rotary_embeddings(small_qwen):
    """Which are kept in an lru_cache: a run on shapes alone would leave its fake tensors there."""
    pipe = dit.qwen()
    go = qwen(pipe, pipelines.image((64, 32)), num_inference_steps=1)
    plain = go()
    with i2am.trace(dit.qwen(), record="qk", output="model") as tracer:
        assert (qwen(tracer.pipe, pipelines.image((64, 32)), num_inference_steps=1)() == plain).all()
    assert tracer.maps().sram((3, 4)).shape == (1, 6, 11)


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
