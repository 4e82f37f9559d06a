"""GLM-Image: each reference is a call of the model beside the denoising, whose keys are read from a cache."""

import pytest

import i2am
from tests import support_table as support
from tests.helpers.families import check_parts, run, traced
from tests.helpers.tiny_models import context
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated


def glm(pipe, guidance, sizes=((24, 16), (16, 32))):
    images = [pipelines.image(size, seed=i) for i, size in enumerate(sizes)]
    return run(pipe, prompt="x", image=images or None, height=16, width=24, guidance_scale=guidance)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family("GLM-Image", "GlmImagePipeline", "in the KV cache, several references")
def test_glm_image(guided):
    pipe = context.glm_image()
    go = glm(pipe, 3.0 if guided else 1.0)
    calls = capture_calls(pipe.transformer, go, ("attn1",))
    calls = [c for c in calls if c.evaluation >= 2]  # behind the two that fill the cache
    chosen = generated(calls, (4, 6), slice(5, 29), evaluations=range(2, 10, 2) if guided else range(2, 6))
    maps = traced(pipe, go)
    parts = {"reference_0": (slice(0, 24), (4, 6)), "reference_1": (slice(24, 56), (8, 4))}
    groups = [0] * 6 + [1] * 4 if guided else [0] * 4 + [1] * 2
    check_parts(maps, parts, chosen, groups=groups)
    assert "into the cache" in str(maps.provenance)


def test_without_a_reference_is_refused():
    pipe = context.glm_image()
    with i2am.trace(pipe):
        glm(pipe, 1.0)()
        with pytest.raises(ValueError, match="no reference image among its tokens"):
            glm(pipe, 1.0, sizes=())()


def test_a_cache_that_was_filled_before_is_refused():
    pipe = context.glm_image()
    tracers = []

    def begin(*_):
        if not tracers and len(seen) == 2:
            tracers.append(i2am.patch_transformer(pipe.transformer))
        seen.append(1)

    seen = []
    pipe.transformer.register_forward_pre_hook(begin)
    with pytest.raises(ValueError, match="put there before tracing began"):
        glm(pipe, 1.0)()
    tracers[0].unpatch()
