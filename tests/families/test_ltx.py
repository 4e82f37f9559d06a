"""LTX and LTX-2: conditions among the tokens of the video, told by their timesteps."""

import pytest
import torch

import i2am
from i2am.families.frames import Frames
from i2am.families.ltx import token_frames
from tests import support_table as support
from tests.helpers.families import GUIDED, generator, traced
from tests.helpers.tiny_models import dit, videos
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check

ROW = (
    "LTX, LTX-2 image to video, conditions, in context",
    "LTXImageToVideoPipeline, LTXConditionPipeline, LTX2ImageToVideoPipeline, LTX2ConditionPipeline, "
    "LTX2InContextPipeline; LTX2HDRPipeline: its transformer, bare",
    "given frames, tokens of the video's own sequence, several references; frames as a strip",
)


def video(pipe, image, **options):
    def go():
        words = {
            f"{kind}prompt_{what}": value
            for kind, seed in (("", 0), ("negative_", 3))
            for what, value in (("embeds", dit.text_tokens(5, seed=seed)), ("attention_mask", torch.ones(1, 5)))
        }
        return pipe(
            image=image,
            width=32,
            height=32,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=generator(),
            output_type="np",
            **words,
            **options,
        ).frames

    return go


@support.family(*ROW)
def test_ltx_image_to_video():
    pipe = videos.ltx("LTXImageToVideoPipeline")
    go = video(pipe, pipelines.image((32, 32)))
    calls = capture_calls(pipe.transformer, go, ("attn1",))
    own = 8 * 8  # tokens of a frame
    assert calls[0].k.shape[2] == 3 * own
    chosen = generated(calls, (16, 8), slice(own, None))
    maps = traced(pipe, go, strip=2)
    assert maps.references == ["reference"]
    assert maps.video("r2g").shape == (1, 2, 8, 8)
    truth = Truth(chosen, samples=GUIDED, keys=slice(0, own), groups=[0, 0, 1, 1], reference_grid=(8, 8))
    check(maps, truth, 2)


@support.family(*ROW)
def test_ltx_conditions_in_place_and_before_the_video():
    """The first frame in place at full strength, a later one before all tokens at half: both stay references."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    pipe = videos.ltx("LTXConditionPipeline")
    first = LTXVideoCondition(image=pipelines.image((32, 32)), frame_index=0, strength=1.0)
    later = LTXVideoCondition(image=pipelines.image((32, 32), seed=2), frame_index=8, strength=0.5)
    go = video(pipe, None, conditions=[first, later])
    calls = capture_calls(pipe.transformer, go, ("attn1",))
    own = 8 * 8
    assert calls[0].k.shape[2] == 4 * own  # [later ‖ first ‖ generated 1, 2]
    maps = traced(pipe, go, strip=2)
    chosen = generated(calls, (16, 8), slice(2 * own, None))
    for i, name in enumerate(["reference_0", "reference_1"]):
        keys = slice(i * own, (i + 1) * own)
        truth = Truth(chosen, samples=GUIDED, keys=keys, groups=[0, 0, 1, 1], reference_grid=(8, 8))
        check(maps, truth, 2, reference=name)


def ltx2_call(model, *, reference=True, **options):
    """[first frame ‖ generated 1, 2 ‖ a reference of two frames of 2×2], guided in the batch."""
    tokens = 3 * 8 + 2 * 4 * reference
    latents, sound = videos.noise(1, tokens, 4), videos.noise(1, 3, 4)
    coords = model.rope.prepare_video_coords(1, 3, 2, 4, "cpu")
    if reference:
        small = model.rope.prepare_video_coords(1, 2, 2, 2, "cpu")
        small[:, 1:] *= 2
        coords = torch.cat([coords, small], dim=2)
    given = torch.tensor([[1.0] * 8 + [0.0] * 16 + [1.0] * 8])[:, :tokens]

    def call(t, text, batch=2):
        x = latents.clone() * t / 900
        return (
            dict(
                hidden_states=x.repeat(batch, 1, 1),
                audio_hidden_states=sound.repeat(batch, 1, 1),
                encoder_hidden_states=torch.cat([text, text + 1])[:batch],
                audio_encoder_hidden_states=torch.cat([text, text + 1])[:batch],
                timestep=(t * (1 - given)).repeat(batch, 1),
                audio_timestep=torch.full((batch,), t),
                audio_num_frames=3,
                video_coords=coords.repeat(batch, 1, 1, 1),
            )
            | options
        )

    return call


@support.family(*ROW)
def test_ltx2_in_context():
    model = videos.ltx2()
    call = ltx2_call(model)
    go = videos.denoise(model, call, guided=False)
    calls = [c for c in capture_calls(model, go, ("attn1",)) if c.k.shape[2] == 32]
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, output="model", record="qk") as tracer:
        assert go().equal(plain)
        with torch.no_grad():  # what else the pipeline calls the model for
            perturbed = call(100.0, dit.text_tokens(5), batch=1)
            model(**perturbed, spatio_temporal_guidance_blocks=[0])
            model(**perturbed, isolate_modalities=True)
    maps = tracer.maps()
    assert maps.layers == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert maps.counts(reference="reference_0")["transformer_blocks.0.attn1"] == [2, 2]
    chosen = generated(calls, (4, 4), slice(8, 24))
    for name, keys, grid in (("reference_0", slice(0, 8), (2, 4)), ("reference_1", slice(24, 32), (4, 2))):
        truth = Truth(chosen, samples=GUIDED, keys=keys, groups=[0, 0, 1, 1], reference_grid=grid)
        check(maps, truth, 2, reference=name)


def test_a_video_of_text_alone_is_refused():
    model = videos.ltx2()
    call = ltx2_call(model, reference=False, timestep=torch.full((2,), 900.0))
    go = videos.denoise(model, call, guided=False)
    with i2am.patch_transformer(model, num_steps=4), pytest.raises(ValueError, match="no reference image among"):
        go()


def test_options_that_do_not_fit_are_refused():
    model = videos.ltx2()
    with pytest.raises(ValueError, match="told by its arguments"):
        i2am.patch_transformer(model, reference=i2am.Reference(tokens=slice(0, 8)))
    with pytest.raises(ValueError, match="goes over frames"):
        i2am.patch_transformer(model, mode="self")
    with pytest.raises(ValueError, match="windows of time"):
        i2am.trace(videos.ltx("LTXI2VLongMultiPromptPipeline"))


def positions(*frames):
    """(time, height, width) of each frame → coordinates ``[3, N]``."""
    each = [torch.cartesian_prod(torch.tensor([t]), torch.arange(h), torch.arange(w)) for t, h, w in frames]
    return torch.cat(each).T


def test_frames_by_coordinates():
    coordinates = positions((0, 2, 3), (1, 2, 3), (9, 2, 3), (0, 2, 3), (0, 1, 2), (8, 1, 2)).double()
    given = [False] * 12 + [True] * 16
    assert token_frames(coordinates, given) == [
        Frames(2, (2, 3), given=False),
        Frames(1, (2, 3), given=True),  # at a later time, and given
        Frames(1, (2, 3), given=True),  # the time falls back
        Frames(2, (1, 2), given=True),  # of another size
    ]
    with pytest.raises(ValueError, match="only a part of the frame is given"):
        token_frames(coordinates, [True] * 4 + [False] * 24)
