"""Wan VACE: reference pictures, the first frames of the sequence, in the model's blocks and its branch's."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth


def call_of(references):
    """Two generated frames behind ``references``; control is [kept 4 ‖ changed 4 ‖ mask 4]."""
    frames = references + 2
    x, control = videos.noise(1, 4, frames, 4, 6), videos.noise(1, 12, frames, 4, 6, seed=2)
    control[:, 4:, :references] = 0

    def call(t, text):
        return dict(
            hidden_states=x * t / 900,
            timestep=torch.tensor([t]),
            encoder_hidden_states=text,
            control_hidden_states=control,
        )

    return call


@support.family(
    "Wan VACE",
    "WanVACEPipeline",
    "the first frames, tokens of the video's own sequence, several; frames as a strip",
)
def test_vace():
    model = videos.vace()
    go = videos.denoise(model, call_of(2))
    calls = capture_calls(model, go, ("attn1",))
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.layers == ["vace_blocks.0.attn1", "vace_blocks.1.attn1", "blocks.0.attn1", "blocks.1.attn1"]
    chosen = generated(calls, (4, 3), slice(12, None), evaluations=range(0, 8, 2))
    for i, name in enumerate(["reference_0", "reference_1"]):
        keys = slice(6 * i, 6 * i + 6)
        truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4, reference_grid=(2, 3))
        support.check(maps, truth, 2, reference=name)


def test_without_reference_pictures_is_refused():
    model = videos.vace()
    with i2am.patch_transformer(model, num_steps=4), pytest.raises(ValueError, match="no reference image among"):
        videos.denoise(model, call_of(0))()
