"""HunyuanVideo: SigLIP's tokens of the first frame among the text's (1.5), or that frame in the video (1.0)."""

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import dit, videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth


def transformer():
    torch.manual_seed(0)
    return HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=dit.TEXT,
        text_embed_2_dim=dit.TEXT,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def loop(model, image):
    noise = torch.randn(1, 9, 3, 4, 6, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def go():
        for t in (900, 700, 400, 100):
            for seed, words in ((0, 4), (3, 2)):  # conditional, then unconditional
                out = model(
                    hidden_states=noise * t / 1000,
                    timestep=torch.tensor([float(t)]),
                    encoder_hidden_states=dit.text_tokens(5, seed=seed),
                    encoder_attention_mask=(torch.arange(5) < words).long()[None],
                    encoder_hidden_states_2=dit.text_tokens(3, seed=seed + 1),
                    encoder_attention_mask_2=torch.tensor([[1, 1, 0]]),
                    image_embeds=image,
                ).sample
        return out

    return go


@support.family(
    "HunyuanVideo 1.5 image-to-video",
    "HunyuanVideo15ImageToVideoPipeline: its transformer, bare",
    "SigLIP's tokens, among the text's; frames as a strip",
)
def test_hunyuan_video_15():
    model = transformer()
    go = loop(model, torch.randn(1, 9, 12))
    calls = [c for c in capture_calls(model, go, ("attn",)) if c.layer.startswith("transformer_blocks")]
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    own = 3 * 4 * 6
    chosen = generated(calls, (12, 6), slice(0, own), evaluations=range(0, 8, 2))
    truth = Truth(chosen, keys=slice(own, own + 9), groups=[0] * 4 + [1] * 4, reference_grid=(3, 3))
    maps = tracer.maps()
    assert maps.layers == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    support.check(maps, truth, 2)


def test_without_a_first_frame_is_refused():
    model = transformer()
    with i2am.patch_transformer(model, num_steps=4), pytest.raises(ValueError, match="no reference image among"):
        loop(model, torch.zeros(1, 9, 12))()


@pytest.mark.parametrize("condition", ["token_replace", "latent_concat"])
@support.family(
    "HunyuanVideo image-to-video",
    "HunyuanVideoImageToVideoPipeline",
    "the first frame's tokens, or LLaVA's among the text's, described; frames as a strip",
)
def test_hunyuan_video(condition):
    replaced = condition == "token_replace"
    model = videos.hunyuan_video(condition)
    noise = videos.noise(1, 4 if replaced else 9, 3, 4, 6)

    def call(t, text):
        return dict(
            hidden_states=noise * t / 900,
            timestep=torch.tensor([t]),
            encoder_hidden_states=torch.cat([videos.noise(1, 8, dit.TEXT), text], dim=1),
            encoder_attention_mask=torch.tensor([[1] * 8 + [1, 1, 1, 0, 0]]),
            pooled_projections=text[:, 0, :8],
        )

    go = videos.denoise(model, call)
    calls = [c for c in capture_calls(model, go, ("attn",)) if c.k.shape[2] == 18 + 13]
    seen = i2am.Reference(grid=(4, 2), tokens=slice(0, 8), name="llava")
    plain = go()
    options = dict(num_steps=4, time_groups=2, guidance=0, output="model", record="qk")
    with i2am.patch_transformer(model, reference=seen, **options) as tracer:
        assert go().equal(plain)
    maps, own = tracer.maps(), slice(6 * replaced, 18)
    assert maps.layers == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    assert maps.references == ["reference", "llava"][1 - replaced :]
    chosen = generated(calls, (6 - 2 * replaced, 3), own, evaluations=range(0, 8, 2))
    for name, keys, grid in (("reference", slice(0, 6), (2, 3)), ("llava", slice(18, 26), (4, 2))):
        if name in maps.references:
            truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4, reference_grid=grid)
            support.check(maps, truth, 2, reference=name)
    if not replaced:
        with pytest.raises(ValueError, match=r"LLaVA sees of it .* reference=i2am\.Reference\(grid=\(24, 12\)"):
            i2am.patch_transformer(model)
