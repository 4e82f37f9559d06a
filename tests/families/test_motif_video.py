"""Motif-Video: SigLIP's tokens of the first frame between the video's and the text's."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import dit, videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth

DUAL, SINGLE, DECODER = 2, 2, 1


def transformer():
    return videos.build(
        "MotifVideoTransformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=DUAL,
        num_single_layers=SINGLE,
        num_decoder_layers=DECODER,
        mlp_ratio=2.0,
        text_embed_dim=dit.TEXT,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
    )


def call_of(image):
    x = videos.noise(1, 9, 3, 4, 6)

    def call(t, text):
        mask = torch.tensor([[1, 1, 1, 1, 0]])
        return dict(
            hidden_states=x * t / 900,
            timestep=torch.tensor([t]),
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            image_embeds=image,
        )

    return call


@support.family(
    "Motif-Video image-to-video",
    "MotifVideoImage2VideoPipeline: its transformer, bare",
    "SigLIP's tokens, among the text's; frames as a strip",
)
def test_motif_video():
    model = transformer()
    go = videos.denoise(model, call_of(videos.noise(1, 9, 12, seed=4)))
    own = 3 * 2 * 3
    calls = [c for c in capture_calls(model, go, ("attn",)) if c.k.shape[2] == own + 9 + 5]
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    names = [f"transformer_blocks.{i}.attn" for i in range(DUAL)]
    assert maps.layers == [*names, *(f"single_transformer_blocks.{i}.attn" for i in range(SINGLE - DECODER))]
    assert maps.frames == 3
    chosen = generated(calls, (6, 3), slice(0, own), evaluations=range(0, 8, 2))
    truth = Truth(chosen, keys=slice(own, own + 9), groups=[0] * 4 + [1] * 4, reference_grid=(3, 3))
    support.check(maps, truth, 2)


def test_without_a_first_frame_is_refused():
    model = transformer()
    with i2am.patch_transformer(model, num_steps=4), pytest.raises(ValueError, match="no reference image among"):
        videos.denoise(model, call_of(None))()
