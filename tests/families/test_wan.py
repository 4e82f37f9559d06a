"""Wan image-to-video against a materialised recomputation from the untraced run."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import generator, traced
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check


@pytest.mark.parametrize("last", [False, True], ids=["first", "first and last"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@support.family(
    "Wan image-to-video", "WanImageToVideoPipeline", "CLIP's tokens, in a call of their own; frames as a strip"
)
def test_wan_image_to_video(guided, last):
    pipe = prompts.wan(last_image=last)

    def go():
        return pipe(
            pipelines.image((48, 32)),
            last_image=pipelines.image((48, 32), seed=1) if last else None,
            prompt_embeds=dit.text_tokens(512),
            negative_prompt_embeds=dit.text_tokens(512, seed=3),
            width=48,
            height=32,
            num_frames=9,
            guidance_scale=3.0 if guided else 1.0,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).frames

    images = 1 + last
    calls = [c for c in capture_calls(pipe.transformer, go, ("attn2",)) if c.k.shape[2] == 10 * images]
    assert {c.nth for c in calls} == {0}
    strip = (3 * 2, 3)  # three latent frames of 2×3 tokens
    maps = traced(pipe, go, strip=3)
    with i2am.patch_transformer(pipe.transformer, num_steps=4) as bare:
        go()
    assert bare.maps().references == maps.references
    assert maps.video("r2g", reference=maps.references[0]).shape == (1, 3, 2, 3)
    assert maps.references == (["reference_0", "reference_1"] if last else ["reference"])
    for i, name in enumerate(maps.references):
        truth = Truth(
            generated(calls, strip, evaluations=range(0, 8, 2) if guided else range(4)),
            keys=slice(10 * i, 10 * i + 10),
            groups=[0] * 4 + [1] * 4 if guided else [0, 0, 1, 1],
            reference_grid=(3, 3),
            skip=1,
        )
        check(maps, truth, 2, directions=("r2g", "g2r", "mass") if last else ("r2g", "g2r"), reference=name)


def test_wan_without_image_keys_is_refused():
    pipe = prompts.wan(image_keys=False)
    with pytest.raises(ValueError, match="channels beside the latents"):
        i2am.trace(pipe)
    with pytest.raises(ValueError, match="channels beside the latents"):
        i2am.patch_transformer(pipe.transformer)
    with pytest.raises(ValueError, match="goes over frames"):
        i2am.patch_transformer(pipe.transformer, mode="self")


KIN = ("SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel", "WanAnimateTransformer3DModel")


@pytest.mark.parametrize("kind", KIN)
@support.family(
    "SkyReels V2, ChronoEdit, Wan Animate",
    "SkyReelsV2ImageToVideoPipeline, ChronoEditPipeline, WanAnimatePipeline: their transformers, bare",
    "CLIP's tokens, in a call of their own; frames as a strip",
)
def test_kin_of_wan(kind):
    transformer = prompts.wan_kin(kind)
    noise, clip = torch.randn(1, 12, 3, 4, 6), torch.randn(1, 10, 12)
    extra = {}
    if kind.startswith("WanAnimate"):
        extra = dict(pose_hidden_states=torch.randn(1, 4, 2, 4, 6), face_pixel_values=torch.randn(1, 3, 5, 16, 16))

    @torch.no_grad()
    def go():
        for t in (900, 700, 400, 100):
            for seed in (0, 3):  # conditional, then unconditional
                out = transformer(
                    hidden_states=noise * t / 1000,
                    timestep=torch.tensor([t]),
                    encoder_hidden_states=dit.text_tokens(512, seed=seed),
                    encoder_hidden_states_image=clip,
                    **extra,
                ).sample
        return out

    calls = [c for c in capture_calls(transformer, go, ("attn2",)) if c.k.shape[2] == 10]
    plain = go()
    with i2am.patch_transformer(
        transformer, num_steps=4, time_groups=2, guidance=0, output="model", record="qk"
    ) as tracer:
        assert go().equal(plain)
    chosen = generated(calls, (6, 3), evaluations=range(0, 8, 2))
    truth = Truth(chosen, groups=[0] * 4 + [1] * 4, reference_grid=(3, 3), skip=1)
    check(tracer.maps(), truth, 2, directions=("r2g", "g2r"))
