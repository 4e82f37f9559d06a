"""Pipelines that are refused by name, with the reason."""

import diffusers
import pytest
import torch

from i2am.families import OURS, no_reference_keys, registry
from i2am.families.untraced import REASONS
from tests.helpers.older_versions import OLDER
from tests.helpers.tiny_models import unet as pipelines


@pytest.mark.parametrize("reason", REASONS)
def test_a_limit_of_ours_is_not_told_as_a_trait_of_the_model(reason):
    said = no_reference_keys("Some", reason)
    assert ("no attention keys encode a reference" in said) == (not reason.startswith(OURS))


def test_every_pattern_means_a_pipeline():
    names = [name for name in dir(diffusers) if "Pipeline" in name]
    if OLDER:
        pytest.skip(f"diffusers {diffusers.__version__} lacks some")
    known = {registry.facts_of(type(name, (), {"__module__": "diffusers"})) for name in names}
    assert {p for patterns in REASONS.values() for p in patterns} <= {facts.pattern for facts in known if facts}


def test_what_diffusers_itself_cannot_run():
    """When this fails, VersatileDiffusionDualGuidedPipeline runs again: then its reason is no longer true."""
    unet = pipelines.unet(dual_cross_attention=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'encoder_attention_mask'"):
        unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77 + 17, pipelines.CONTEXT))
    told = registry.why_not(diffusers.VersatileDiffusionDualGuidedPipeline)
    assert "encoder_attention_mask" in told
