"""Cosmos: frames that a mask gives."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth


def call_of(mask):
    x = videos.noise(1, 4, 3, 4, 6)

    def call(t, text):
        return dict(
            hidden_states=x * t / 900,
            timestep=torch.full((1, 1, 3, 1, 1), t) if mask is not None else torch.tensor([t]),
            encoder_hidden_states=text,
            condition_mask=mask,
            fps=16,
        )

    return call


def first_frame():
    mask = torch.zeros(1, 1, 3, 4, 6)
    mask[:, :, 0] = 1
    return mask


@support.family(
    "Cosmos video to world",
    "CosmosVideoToWorldPipeline, Cosmos2VideoToWorldPipeline, Cosmos2_5_PredictBasePipeline",
    "given frames, tokens of the video's own sequence; frames as a strip",
)
def test_cosmos():
    model = videos.cosmos()
    go = videos.denoise(model, call_of(first_frame()))
    calls = capture_calls(model, go, ("attn1",))
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    chosen = generated(calls, (4, 3), slice(6, None), evaluations=range(0, 8, 2))
    truth = Truth(chosen, keys=slice(0, 6), groups=[0] * 4 + [1] * 4, reference_grid=(2, 3))
    support.check(tracer.maps(), truth, 2)


def test_masks_that_do_not_fit_are_refused():
    model = videos.cosmos()
    part = first_frame()
    part[..., 0] = 0
    for mask, said in ((first_frame() * 0, "no reference image among"), (part, "a part of a frame")):
        with i2am.patch_transformer(model, num_steps=4, guidance=0), pytest.raises(ValueError, match=said):
            videos.denoise(model, call_of(mask))()
