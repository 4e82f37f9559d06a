"""Qwen-Image 2.1: references inside the prompt, the generated queries in a call of their own, keys from a cache."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import check_parts, run
from tests.helpers.tiny_models import context
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls
from tests.helpers.truth import Captured

SIZES = ((64, 32), (32, 32))  # (width, height), which are resized: 96×32 and 64×64, of tokens of 16 pixels


def pictures(count):
    return [pipelines.image(size, seed=i) for i, size in enumerate(SIZES[:count])]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family("Qwen-Image 2.1", "QwenImage21Pipeline", "tokens in context, several references, then in the KV cache")
def test_qwen_image_21(guided, cached):
    pipe = context.qwen21()
    options = dict(negative_prompt="no", true_cfg_scale=3.0) if guided else {}
    go = run(
        pipe,
        prompt="x",
        image=pictures(2),
        height=64,
        width=96,
        output_resolution=64,
        use_kv_cache=cached,
        output_type="latent",
        **options,
    )

    calls = capture_calls(pipe.transformer, go, ("attn",))
    final = [c for c in calls if c.q.shape[2] == 24]  # the generated queries, after those of each part of the prompt
    assert len(final) == 2 * 4 * (1 + guided)
    prompts = (1 if cached else 4) * (1 + guided)  # calls in which the prompt's five parts attend
    assert len(calls) - len(final) == 2 * 5 * prompts
    seen = [
        Captured(c.evaluation, c.layer, 0, (4, 6), c.q, c.k, c.mask) for c in final if not (guided and c.evaluation % 2)
    ]
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        assert go().equal(plain)
    groups = [0] * 4 + [1] * 4 if guided else [0, 0, 1, 1]
    # three words, reference_0, two words, reference_1, one word, the generated picture
    parts = {"reference_0": (slice(3, 15), (2, 6)), "reference_1": (slice(17, 33), (4, 4))}
    check_parts(tracer.maps(), parts, seen, groups=groups)


def test_without_a_reference_is_refused():
    pipe = context.qwen21()
    type(pipe).encode_prompt = lambda self, **options: (context.text_tokens(3), None, torch.zeros(1, 3).bool())
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among its tokens"):
        run(pipe, prompt="x", height=64, width=64, output_type="latent")()
