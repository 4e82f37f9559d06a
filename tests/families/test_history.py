"""Framepack and Helios: frames that came before, at three scales."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth


def check_parts(model, go, kinds, grid, parts, total):
    """``parts``: name → (first key, grid). The generated tokens are ``total`` of ``grid``'s."""
    calls = [c for c in capture_calls(model, go, kinds) if c.k.shape[2] >= total]
    plain = go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, guidance=0, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.references == list(parts)
    own = grid[0] * grid[1]
    chosen = generated(calls, grid, slice(total - own, total), evaluations=range(0, 8, 2))
    for name, (start, (h, w)) in parts.items():
        keys = slice(start, start + h * w)
        truth = Truth(chosen, keys=keys, groups=[0] * 4 + [1] * 4, reference_grid=(h, w))
        support.check(maps, truth, 2, reference=name)
    return maps


@support.family(
    "Framepack",
    "HunyuanVideoFramepackPipeline",
    "given frames at three scales and SigLIP's tokens of the picture, in one sequence; frames as a strip",
)
def test_framepack():
    model = videos.framepack()
    x = videos.noise(1, 4, 2, 8, 12)
    history = {"clean": 2, "history_2x": 3, "history_4x": 5}
    latents = {f"latents_{n}": videos.noise(1, 4, f, 8, 12, seed=f) for n, f in history.items()}
    places = {f"indices_latents_{n}": torch.arange(f) for n, f in history.items()}
    picture = videos.noise(1, 9, 12)

    def call(t, text):
        return dict(
            hidden_states=x * t / 900,
            timestep=torch.tensor([t]),
            encoder_hidden_states=text,
            encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
            pooled_projections=text[:, 0, :8],
            image_embeds=picture,
            indices_latents=torch.arange(2),
            **latents,
            **places,
        )

    go = videos.denoise(model, call)
    # 4×: 5 frames of 8×12 in patches of 4×8×8, padded: 2 of 1×2; 2×: 3 in 2×4×4: 2 of 2×3; clean: 2 of 4×6
    parts = {"history_4x": (0, (2, 2)), "history_2x": (4, (4, 3)), "clean": (16, (8, 6)), "picture": (112, (3, 3))}
    maps = check_parts(model, go, ("attn",), (8, 6), parts, 112)
    assert maps.layers == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


@support.family(
    "Helios",
    "HeliosPipeline",
    "given frames at three scales in one sequence; frames as a strip",
)
def test_helios():
    model = videos.helios()
    x = videos.noise(1, 4, 2, 8, 12)
    history = {"short": 2, "mid": 3, "long": 5}
    latents = {f"latents_history_{n}": videos.noise(1, 4, f, 8, 12, seed=f) for n, f in history.items()}
    places = {f"indices_latents_history_{n}": torch.arange(f)[None] for n, f in history.items()}

    def call(t, text):
        here = dict(hidden_states=x * t / 900, timestep=torch.tensor([t]), encoder_hidden_states=text)
        return here | {"indices_hidden_states": torch.arange(5, 7)[None]} | latents | places

    go = videos.denoise(model, call)
    parts = {"long": (0, (2, 2)), "mid": (4, (4, 3)), "short": (16, (8, 6))}
    maps = check_parts(model, go, ("attn1",), (8, 6), parts, 112)
    assert maps.layers == ["blocks.0.attn1", "blocks.1.attn1"]
    with i2am.patch_transformer(model, num_steps=4), pytest.raises(ValueError, match="no reference image among"):
        model(x, torch.tensor([900]), videos.noise(1, 5, 16))
