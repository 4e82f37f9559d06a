"""SD3 with an IP-Adapter against a materialised recomputation from the untraced run."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.families import run, traced
from tests.helpers.tiny_models import dit, prompts
from tests.helpers.tiny_models import unet as pipelines
from tests.helpers.tokens import capture_calls, generated
from tests.helpers.truth import Truth
from tests.support_table import check


def sd3_inputs(guided):
    common = dict(
        prompt_embeds=dit.text_tokens(5),
        negative_prompt_embeds=dit.text_tokens(5, seed=1),
        pooled_prompt_embeds=torch.ones(1, 8),
        negative_pooled_prompt_embeds=torch.zeros(1, 8),
        width=24,
        height=32,
        guidance_scale=4.0 if guided else 1.0,
    )
    return common | dict(ip_adapter_image=pipelines.image())


@pytest.mark.parametrize("guided", [True, False])
@support.family("SD3 IP-Adapter", "StableDiffusion3Pipeline", "behind the image's own keys (resampled)")
def test_sd3_ip_adapter(guided):
    pipe = prompts.sd3()
    go = run(pipe, **sd3_inputs(guided))
    calls = capture_calls(pipe.transformer, go, ("attn",))
    assert calls[1].k.shape[2] == 8 * 6 + 6  # the image's own tokens, then the resampled ones
    truth = Truth(
        generated(calls, (8, 6), nth=1),
        samples=slice(1, 2) if guided else slice(0, 1),
        keys=slice(48, 54),
        groups=[0, 0, 1, 1],
    )
    maps = traced(pipe, go)
    assert maps.references == ["ip_adapter"]
    assert maps.canvas == (32, 24)
    check(maps, truth, 2, directions=("r2g", "mass"))


@support.family("SD3 IP-Adapter", "StableDiffusion3Pipeline", "behind the image's own keys (resampled)")
def test_sd3_skip_layer_guidance():
    """A third evaluation of a step, of the conditional half alone: it does not count."""
    pipe = prompts.sd3()
    slg = dict(skip_guidance_layers=[0], skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=1.0)
    go = run(pipe, **sd3_inputs(True), **slg)
    calls = capture_calls(pipe.transformer, go, ("attn",))
    assert [c.q.shape[0] for c in calls if c.layer.startswith("transformer_blocks.1") and c.nth == 1] == [2, 1] * 4
    chosen = generated(calls, (8, 6), nth=1, evaluations=range(0, 8, 2))
    truth = Truth(chosen, samples=slice(1, 2), keys=slice(48, 54), groups=[0] * 4 + [1] * 4)
    check(traced(pipe, go), truth, 2, directions=("r2g", "mass"))


def test_sd3_without_adapter_and_itself():
    pipe = prompts.sd3(adapter=False, dual_attention_layers=(0,))  # as SD 3.5 medium's: a second one, without text
    with pytest.raises(ValueError, match="draws from text alone"):
        i2am.trace(pipe)
    with pytest.raises(ValueError, match="no IP-Adapter is loaded"):
        i2am.patch_transformer(pipe.transformer)
    inputs = sd3_inputs(True)
    inputs.pop("ip_adapter_image")
    go = run(pipe, **inputs)
    calls = capture_calls(pipe.transformer, go, ("attn",))
    own = slice(0, 48)
    truth = Truth(
        generated(calls, (8, 6), own), samples=slice(1, 2), keys=own, groups=[0, 0, 1, 1], reference_grid=(8, 6)
    )
    maps = traced(pipe, go, mode="self")
    assert maps.references == ["self"]
    check(maps, truth, 2, directions=("r2g", "g2r", "mass"))
