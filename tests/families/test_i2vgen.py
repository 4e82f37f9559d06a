"""I2VGen-XL: the first frame's latents and CLIP embedding behind the text; frames are the batch."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import dit, videos
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth

FRAMES, TEXT = 3, 5


@support.family(
    "I2VGen-XL",
    "I2VGenXLPipeline",
    "tokens of the first frame's latents, and of its CLIP embedding; frames are the batch",
)
def test_i2vgen():
    model = videos.i2vgen()
    x, first = videos.noise(1, 4, FRAMES, 16, 24), videos.noise(1, 4, FRAMES, 16, 24, seed=2)
    embedding = torch.cat([torch.zeros(1, dit.TEXT), videos.noise(1, dit.TEXT, seed=4)])  # [uncond, cond]

    def call(t, text):
        return dict(
            sample=(x * t / 900).repeat(2, 1, 1, 1, 1),
            timestep=torch.tensor(t),
            fps=torch.tensor([16, 16]),
            image_latents=first.repeat(2, 1, 1, 1, 1),
            image_embeddings=embedding,
            encoder_hidden_states=torch.cat([text + 1, text]),
        )

    go = videos.denoise(model, call, guided=False)
    calls = [c for c in capture_calls(model, go, ("attn2",)) if c.k.shape[2] == TEXT + 64 + 4]
    grids = {16 * 24: (16, 24), 8 * 12: (8, 12)}
    plain = go()
    with i2am.patch_unet(model, num_steps=4, time_groups=2, output="model", record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert maps.references == ["first_frame", "clip"]
    chosen = generated(calls, lambda c: grids[c.q.shape[2]])
    common = dict(samples=slice(FRAMES, None), groups=[0, 0, 1, 1])
    for name, keys, grid in (("first_frame", slice(TEXT, TEXT + 64), (8, 8)), ("clip", slice(TEXT + 64, None), None)):
        truth = Truth(chosen, keys=keys, reference_grid=grid, **common)
        directions = ("r2g", "mass", "g2r") if grid else ("r2g", "mass")
        support.check(maps, truth, 2, reference=name, directions=directions)
    assert maps.ulam("r2g", reference="clip").shape[0] == FRAMES


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the context of a I2VGenXLUNet is known"):
        i2am.patch_unet(videos.i2vgen(), reference=i2am.Reference())
