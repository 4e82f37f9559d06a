"""Stable Video Diffusion against a materialised recomputation from the untraced run."""

import pytest

import i2am
from tests import support_table as support
from tests.helpers.families import generator, traced
from tests.helpers.tiny_models import prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check


@pytest.mark.parametrize("videos", [1, 2])
@support.family("Stable Video Diffusion", "StableVideoDiffusionPipeline", "one CLIP token; frames are the batch")
def test_stable_video_diffusion(videos):
    """Frames are images of the batch; the one CLIP token leaves R2G alone."""
    pipe = prompts.svd()
    frames = 3 * videos

    def go():
        return pipe(
            pipelines.image((32, 32)),
            width=24,
            height=32,
            num_frames=3,
            num_videos_per_prompt=videos,
            num_inference_steps=4,
            generator=generator(),
            output_type="np",
        ).frames

    calls = capture_calls(pipe.unet, go, ("attn2",))
    spatial = [c for c in calls if "temporal" not in c.layer]
    assert spatial
    assert spatial[0].q.shape[0] == 2 * frames
    grids = {192: (16, 12), 48: (8, 6)}
    truth = Truth(
        generated(spatial, lambda c: grids[c.q.shape[2]]), samples=slice(frames, 2 * frames), groups=[0, 0, 1, 1]
    )
    maps = traced(pipe, go)
    assert maps.batch == frames
    assert maps.ulam("r2g").shape == (frames, 16, 12)
    assert maps.frames == 3
    assert maps.video("r2g").equal(maps.ulam("r2g").unflatten(0, (videos, 3)))
    check(maps, truth, 2, directions=("r2g",))
    with pytest.raises(ValueError, match="identically 1"):
        maps.ulam("g2r")
    with i2am.patch_unet(pipe.unet, reference=i2am.Reference(), num_steps=4) as bare:
        go()
    assert bare.maps().batch == frames  # guidance by its repeated latents, the image's channels aside
    with pytest.raises(ValueError, match="goes over frames"):
        i2am.trace(pipe, mode="self")
