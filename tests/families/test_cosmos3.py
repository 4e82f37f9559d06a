"""Cosmos 3: frames that are not noisy, behind the text among the keys of the second call of each layer."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import dit, videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth

FRAMES, GRID, SOUND = 3, (2, 3), 4
OWN = GRID[0] * GRID[1]


def call_of(noisy):
    """Return the arguments of one call: a video of which some frames are noisy, and its sound."""
    video, sound = videos.noise(1, 4, FRAMES, 4, 6), videos.noise(4, SOUND, seed=2)

    def call(t, text):
        words = 5 if text.equal(dit.text_tokens(5)) else 7  # the negative prompt is longer
        image, total = words + FRAMES * OWN, words + FRAMES * OWN + SOUND
        frames = torch.tensor(noisy, dtype=torch.long)
        places = (words + frames[:, None] * OWN + torch.arange(OWN)).flatten()
        return dict(
            input_ids=torch.arange(words),
            text_indexes=torch.arange(words),
            position_ids=torch.arange(total).expand(3, -1),
            und_len=words,
            sequence_length=total,
            vision_tokens=[video * t / 900],
            vision_token_shapes=[(FRAMES, *GRID)],
            vision_sequence_indexes=torch.arange(words, image),
            vision_mse_loss_indexes=places,
            vision_timesteps=torch.full((len(places),), t),
            vision_noisy_frame_indexes=[frames],
            sound_tokens=[sound * t / 900],
            sound_token_shapes=[(SOUND, 1, 1)],
            sound_sequence_indexes=torch.arange(image, total),
            sound_mse_loss_indexes=torch.arange(image, total),
            sound_timesteps=torch.full((SOUND,), t),
            sound_noisy_frame_indexes=[torch.arange(SOUND)],
        )

    return call


@support.family(
    "Cosmos 3",
    "Cosmos3OmniPipeline",
    "given frames, tokens of the video's own sequence; frames as a strip",
)
def test_cosmos_3():
    model = videos.cosmos3()
    go = videos.denoise(model, call_of([1, 2]))
    calls = capture_calls(model, go, ("self_attn",))  # two heads share a key
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert all(a.equal(b) for a, b in zip(go(), plain, strict=True))
    maps = tracer.maps()
    assert (maps.frames, maps._video.lead) == (2, 1)
    chosen = generated(calls, (4, 3), slice(OWN, FRAMES * OWN), nth=1, evaluations=range(0, 8, 2))
    truth = Truth(chosen, keys=slice(5, 5 + OWN), groups=[0] * 4 + [1] * 4, reference_grid=GRID)
    support.check(maps, truth, 2)


@pytest.mark.parametrize(
    ("noisy", "said"), [([0, 1, 2], "no reference image among"), ([], r"generates frames of none")]
)
def test_calls_without_given_or_generated_frames_are_refused(noisy, said):
    model = videos.cosmos3()
    with i2am.patch_transformer(model, num_steps=4, guidance=0), pytest.raises(ValueError, match=said):
        videos.denoise(model, call_of(noisy))()
