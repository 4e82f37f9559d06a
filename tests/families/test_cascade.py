"""Stable Cascade's prior: tokens of pictures behind the layer's own, the text's and its pooled one."""

import diffusers
import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import dit, videos
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth, assert_peak


def prior():
    return videos.build(
        "StableCascadeUNet",
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=1,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_in_channels=dit.TEXT,
        clip_text_pooled_in_channels=8,
        clip_image_in_channels=12,
        clip_seq=4,
        kernel_size=3,
        dropout=(0.0, 0.0),
        self_attn=(True, False),
        switch_level=(False,),
    )


def pipeline():
    parts = dict(tokenizer=None, text_encoder=dit.Device(), feature_extractor=None, image_encoder=None)
    return pipelines.quiet(
        diffusers.StableCascadePriorPipeline(prior=prior(), scheduler=diffusers.DDPMWuerstchenScheduler(), **parts)
    )


def run(pipe, pictures):
    def go():
        return pipe(
            prompt_embeds=dit.text_tokens(5),
            prompt_embeds_pooled=videos.noise(1, 1, 8),
            negative_prompt_embeds=dit.text_tokens(5, seed=3),
            negative_prompt_embeds_pooled=videos.noise(1, 1, 8, seed=3),
            image_embeds=pictures,
            height=8 * 42,
            width=6 * 42,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(7),
        ).image_embeddings

    return go


@support.family(
    "Stable Cascade's prior",
    "StableCascadePriorPipeline",
    "four tokens of each picture's embedding, behind the layer's own keys and the text's; several references",
)
def test_stable_cascade():
    pipe = pipeline()
    go = run(pipe, videos.noise(1, 2, 12))
    calls = capture_calls(pipe.prior, go, ("attention",))
    grids = {n[0] * n[1]: n for n in ((8, 6), (9, 6), (8, 5), (4, 3), (5, 3), (4, 2))}
    plain = go()
    with i2am.trace(pipe, time_groups=2, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    chosen = generated(calls, lambda c: grids[c.q.shape[2]])
    assert {c.k.shape[2] - c.q.shape[2] * (c.k.shape[2] > 30) for c in calls} == {5 + 4 + 8}
    for i, name in enumerate(["reference_0", "reference_1"]):
        keys = slice(4 * i - 8, 4 * i - 4 or None)
        truth = Truth(chosen, samples=slice(0, 1), keys=keys, groups=[0, 0, 1, 1])  # [cond, uncond]
        support.check(maps, truth, 2, reference=name, directions=("r2g", "mass"))
        with pytest.raises(ValueError, match="no 2-D layout"):
            maps.ulam("g2r", reference=name)


def test_stable_cascade_itself():
    pipe = pipeline()
    go = run(pipe, None)
    with i2am.trace(pipe), pytest.raises(ValueError, match="no reference image among"):
        go()
    calls = [c for c in capture_calls(pipe.prior, go, ("attention",)) if c.k.shape[2] > c.q.shape[2]]
    own = calls[0].q.shape[2]
    grid = {48: (8, 6), 54: (9, 6), 40: (8, 5)}[own]
    with i2am.trace(pipe, mode="self", time_groups=2) as tracer:
        go()
    chosen = generated([c for c in calls if c.q.shape[2] == own], grid)
    truth = Truth(chosen, samples=slice(0, 1), keys=slice(0, own), groups=[0, 0, 1, 1], reference_grid=grid)
    for direction in ("r2g", "g2r"):
        assert_peak(tracer.maps().ulam(direction), truth.ulam(direction))
