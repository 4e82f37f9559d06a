"""Z-Image-Omni: ragged captions, references and SigLIP tokens in one sequence."""

import pytest

import i2am
from tests import support_table as support
from tests.helpers.families import run, traced
from tests.helpers.tiny_models import context
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak

KINDS = ("attention",)
SIZES = ((16, 12), (12, 16))  # (width, height), of tokens of 4 pixels


def pictures(count):
    return [pipelines.image(size, seed=i) for i, size in enumerate(SIZES[:count])]


@pytest.mark.parametrize(("count", "guidance"), [(2, 3.0), (1, 3.0), (1, 0.0)], ids=["two", "one", "plain"])
@support.family("Z-Image-Omni", "ZImageOmniPipeline", "tokens in context, several references; SigLIP's besides")
def test_z_image_omni(count, guidance):
    """[cond, uncond]; captions pad to 32 tokens, so the unconditional prompt's other length moves everything."""
    pipe = context.z_image(captions=(40, 7))
    go = run(
        pipe, prompt="x", image=pictures(count), height=16, width=24, guidance_scale=guidance, num_images_per_prompt=1
    )
    calls = capture_calls(pipe.transformer, go, KINDS)
    maps = traced(pipe, go)
    assert maps.layers == ["noise_refiner.0.attention", "layers.0.attention", "layers.1.attention"]
    names = ["reference"] if count == 1 else ["reference_0", "reference_1"]
    assert maps.references == [*names, *(f"{name}.siglip" for name in names)]
    text, generated_at = 96 + 32 * count, 32 * count  # captions: 40, 3, … and 2 words
    for i, name in enumerate(names):
        grid = (SIZES[i][1] // 4, SIZES[i][0] // 4)
        for layers, start in (("noise_refiner.*", 0), ("layers.*", text)):
            mine = [c for c in calls if c.layer.startswith(layers[:-1])]
            chosen = generated(mine, (4, 6), slice(start + generated_at, start + generated_at + 24))
            keys = slice(start + 32 * i, start + 32 * i + 12)
            truth = Truth(chosen, samples=slice(0, 1), keys=keys, groups=[0, 0, 1, 1], reference_grid=grid)
            support.check(maps, truth, 2, reference=name, layers=layers)
        start = text + 32 * (count + 1) + 32 * i
        mine = [c for c in calls if c.layer.startswith("layers.")]
        chosen = generated(mine, (4, 6), slice(text + generated_at, text + generated_at + 24))
        truth = Truth(chosen, samples=slice(0, 1), keys=slice(start, start + 6), groups=[0, 0, 1, 1])
        support.check(maps, truth, 2, ("r2g", "mass"), reference=f"{name}.siglip")
        with pytest.raises(ValueError, match="no 2-D layout"):
            maps.ulam("g2r", reference=f"{name}.siglip")
    assert mine[0].k.shape[2] >= start + 64  # references, and 32 tokens for the generated picture's missing one


def test_prompts_of_several_lengths_are_refused():
    """Their tokens are in different places, and one batch has one layout."""
    pipe = context.z_image()

    def two(self, prompt=None, num_condition_images=0, **options):
        return [[context.text_tokens(n, seed=n)[0] for n in (first, 3, 2)] for first in (5, 40)], []

    type(pipe).encode_prompt = two
    go = run(pipe, prompt=["x", "y"], image=pictures(1), height=16, width=24, guidance_scale=0.0)
    with i2am.trace(pipe), pytest.raises(ValueError, match="one prompt at a time"):
        go()


def test_without_a_reference_is_refused():
    pipe = context.z_image()
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        run(pipe, prompt="x", height=16, width=24)()


def test_self_attention_of_the_generated_picture():
    pipe = context.z_image()
    go = run(pipe, prompt="x", image=pictures(1), height=16, width=24, guidance_scale=0.0)
    calls = capture_calls(pipe.transformer, go, KINDS)
    with i2am.trace(pipe, time_groups=2, output="model", mode="self") as tracer:
        go()
    mine = [c for c in calls if c.layer.startswith("layers.")]
    own = slice(96 + 32, 96 + 32 + 24)
    truth = Truth(generated(mine, (4, 6), own), keys=own, groups=[0, 0, 1, 1], reference_grid=(4, 6))
    assert_peak(tracer.maps().ulam("g2r", layers="layers.*"), truth.ulam("g2r"))
