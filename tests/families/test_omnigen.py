"""OmniGen: references where the prompt names them, padded on the left, guidance in thirds."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import check_parts, run, traced
from tests.helpers.tiny_models import context
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated

PROMPT = "ab <img><|image_1|></img> cd <img><|image_2|></img> e"


@support.family("OmniGen", "OmniGenPipeline", "tokens in context, where the prompt names them, several references")
def test_omnigen():
    """[cond, uncond, image only]: the first of three counts."""
    pipe = context.omnigen()
    images = [pipelines.image((32, 16)), pipelines.image((16, 32), seed=1)]
    inner = run(pipe, prompt=PROMPT, input_images=images, height=32, width=48, max_input_image_size=64)

    def go():
        torch.manual_seed(0)  # its encoder's samples take no generator
        return inner()

    calls = capture_calls(pipe.transformer, go, ("self_attn",))
    assert calls[0].q.shape[0] == 3
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_image_sizes"][0]), with_kwargs=True)
    maps = traced(pipe, go)
    (a, b), (c, d) = seen[0]
    assert b - a == d - c == 2  # tokens of 16 pixels
    total = calls[0].k.shape[2]
    chosen = generated(calls, (2, 3), slice(total - 6, total))
    parts = {"reference_0": (slice(a, b), (1, 2)), "reference_1": (slice(c, d), (2, 1))}
    check_parts(maps, parts, chosen, groups=[0, 0, 1, 1], samples=slice(0, 1))


def test_without_a_reference_is_refused():
    pipe = context.omnigen()
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        run(pipe, prompt="ab", height=32, width=32, max_input_image_size=64)()
