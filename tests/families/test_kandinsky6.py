"""Kandinsky 6 TI2VA: the picture's frame behind those of the video, its sound beside it."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth

FRAMES, OWN = 2, 6  # of 4×6 latents: 2×3 tokens


def call_of(given, picture=True):
    """Return the arguments of one call: two frames, and the picture behind them."""
    video = videos.noise(1, FRAMES + picture, 4, 6, 4)
    audio = videos.noise(1, 7, 4, seed=2)

    def call(t, text):
        mask = torch.zeros(1, FRAMES + picture, 4, 6, 1)
        mask[:, FRAMES:] = given
        return dict(
            hidden_states=torch.cat([video * t / 900, torch.zeros_like(video), mask], dim=-1),
            audio_hidden_states=audio * t / 900,
            encoder_hidden_states=text,
            pooled_projections=text[:, 0, :8],
            timestep=torch.tensor([t]),
            visual_token_type_ids=mask[..., 0, 0, 0].long(),
        )

    return call


@support.family(
    "Kandinsky 6",
    "Kandinsky6TI2VAPipeline",
    "the picture, a frame behind the video's in its self-attention; frames as a strip",
)
def test_kandinsky_6():
    model = videos.kandinsky6()
    go = videos.denoise(model, call_of(1.0))
    calls = [c for c in capture_calls(model, go, ("self_attention",)) if "video_dec_block" in c.layer]
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.frames == FRAMES
    assert len(maps.layers) == 2
    chosen = generated(calls, (FRAMES * 2, 3), slice(0, FRAMES * OWN), evaluations=range(0, 8, 2))
    truth = Truth(chosen, keys=slice(FRAMES * OWN, None), groups=[0] * 4 + [1] * 4, reference_grid=(2, 3))
    support.check(maps, truth, 2)


def test_calls_without_the_picture_are_refused():
    model = videos.kandinsky6()
    for call, said in ((call_of(0.0, picture=False), "no reference image among"), (half(), "a part of a frame")):
        with i2am.patch_transformer(model, num_steps=4, guidance=0), pytest.raises(ValueError, match=said):
            videos.denoise(model, call)()


def half():
    mask = torch.zeros(1, 4, 6, 1)
    mask[..., :3, :] = 1
    return call_of(mask)
