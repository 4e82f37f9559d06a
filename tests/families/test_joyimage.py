"""JoyImage-Edit and -Plus: generated tokens first, then references, then text."""

import pytest
import torch

from tests import support_table as support
from tests.helpers.families import check_parts, run, traced
from tests.helpers.tiny_models import context
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated

JOY = "JoyImage-Edit, -Plus", "JoyImageEditPipeline, JoyImageEditPlusPipeline", "tokens in context, several references"


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family(*JOY)
def test_joyimage_edit(guided):
    """The pipeline's tensor has the reference first, the model's tokens the generated picture; guidance is a call."""
    pipe = context.joyimage()
    picture = pipelines.image((24, 16))
    go = run(
        pipe, prompt=["x"], image=picture, height=16, width=24, guidance_scale=3.0 if guided else 1.0, output_type="pt"
    )

    def turned():
        torch.manual_seed(0)  # its encoder's samples take no generator
        return go().permute(0, 2, 3, 1).numpy()

    calls = capture_calls(pipe.transformer, turned, ("attn",))
    chosen = generated(calls, (4, 6), slice(0, 24), evaluations=range(0, 8, 2) if guided else range(4))
    groups = [0] * 4 + [1] * 4 if guided else [0, 0, 1, 1]
    check_parts(traced(pipe, turned), {"reference": (slice(24, 48), (4, 6))}, chosen, groups=groups)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family(*JOY)
def test_joyimage_edit_plus(guided):
    """Pictures of several sizes; [uncond, cond], the shorter prompt masked."""
    pipe = context.joyimage(plus=True)
    images = [[pipelines.image((24, 16)), pipelines.image((16, 20), seed=1)]]
    go = run(pipe, prompt="x", images=images, height=16, width=24, guidance_scale=3.0 if guided else 1.0)
    calls = capture_calls(pipe.transformer, go, ("attn",))
    assert calls[0].mask is not None
    assert calls[0].q.shape[0] == 1 + guided
    chosen = generated(calls, (4, 6), slice(0, 24))
    parts = {"reference_0": (slice(24, 48), (4, 6)), "reference_1": (slice(48, 68), (5, 4))}
    samples = slice(int(guided), None)
    check_parts(traced(pipe, go), parts, chosen, groups=[0, 0, 1, 1], samples=samples)
