"""Given frames at a lower timestep: Wan 2.2 TI2V, SkyReels V2's diffusion forcing, AnyFlow."""

import diffusers
import pytest
import torch

import i2am
from i2am.families.frames import Roles
from tests import support_table as support
from tests.helpers.families import generator, traced
from tests.helpers.tiny_models import dit, prompts, videos
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check

ROW = (
    "Wan 2.2 TI2V, SkyReels V2 diffusion forcing, AnyFlow",
    "WanImageToVideoPipeline, SkyReelsV2DiffusionForcingImageToVideoPipeline, AnyFlowPipeline",
    "given frames, tokens of the video's own sequence; frames as a strip",
)


@support.family(*ROW)
def test_wan_22_image_to_video():
    """A timestep for each token, zero for those of the first frame."""
    wan = prompts.wan(image_keys=False)
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan.vae,
        scheduler=dit.flow(),
        transformer=videos.build("WanTransformer3DModel", **videos.WAN),
        expand_timesteps=True,
    )
    pipelines.quiet(pipe)

    def go():
        return pipe(
            pipelines.image((48, 32)),
            prompt_embeds=dit.text_tokens(512),
            negative_prompt_embeds=dit.text_tokens(512, seed=3),
            width=48,
            height=32,
            num_frames=9,
            guidance_scale=3.0,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).frames

    calls = capture_calls(pipe.transformer, go, ("attn1",))
    assert calls[0].k.shape[2] == 3 * 6
    chosen = generated(calls, (4, 3), slice(6, None), evaluations=range(0, 8, 2))
    maps = traced(pipe, go, strip=2)
    assert maps.video("r2g").shape == (1, 2, 2, 3)
    check(maps, Truth(chosen, keys=slice(0, 6), groups=[0] * 4 + [1] * 4, reference_grid=(2, 3)), 2)


KINDS = {
    "SkyReelsV2Transformer3DModel": lambda x, t, frames: dict(
        hidden_states=x, timestep=frames, enable_diffusion_forcing=True
    ),
    "AnyFlowTransformer3DModel": lambda x, t, frames: dict(
        hidden_states=x.transpose(1, 2), timestep=frames, r_timestep=frames
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@support.family(*ROW)
def test_a_timestep_for_each_frame(kind):
    """The first and the last frame are given, the two between are generated."""
    model = videos.build(kind, **videos.WAN)
    x = videos.noise(1, 4, 4, 4, 6)

    def call(t, text):
        frames = torch.tensor([[0.0, t, t, 0.0]])
        return KINDS[kind](x * t / 900, t, frames) | {"encoder_hidden_states": text}

    go = videos.denoise(model, call)
    calls = capture_calls(model, go, ("attn1",))
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    chosen = generated(calls, (4, 3), slice(6, 18), evaluations=range(0, 8, 2))
    for name, keys in (("reference_0", slice(0, 6)), ("reference_1", slice(18, 24))):
        truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4, reference_grid=(2, 3))
        check(maps, truth, 2, reference=name)


def test_roles_last_a_run():
    roles = Roles()
    assert roles.read(torch.tensor([[500.0, 900.0]])) == [True, False]
    assert roles.read(torch.tensor([[400.0, 400.0]])) == [True, False]  # came down to the condition's
    assert roles.read(torch.tensor([[900.0, 900.0]])) == [False, False]  # another run, which is given nothing
    with pytest.raises(ValueError, match="asynchronous diffusion forcing"):
        roles.read(torch.tensor([[700.0, 900.0]]))
    with pytest.raises(ValueError, match="different frames"):
        roles.read(torch.tensor([[0.0, 900.0], [900.0, 900.0]]))


def test_what_is_not_given_is_refused():
    model = videos.build("WanTransformer3DModel", **videos.WAN)
    x = videos.noise(1, 4, 2, 4, 6)
    given = dict(hidden_states=x, encoder_hidden_states=dit.text_tokens(5), return_dict=False)
    with i2am.patch_transformer(model, num_steps=1) as tracer:
        with pytest.raises(ValueError, match="no reference image among"):
            model(timestep=torch.tensor([900.0]), **given)
        tracer.reset()
        half = torch.tensor([[0.0, 900.0] * 6])
        with pytest.raises(ValueError, match="only a part of a frame"):
            model(timestep=half, **given)
