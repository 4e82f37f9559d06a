"""Pipelines that are refused by name, with the reason."""

import diffusers
import pytest

from i2am.families import OURS, no_reference_keys, registry
from i2am.families.untraced import REASONS
from tests.helpers.older_versions import OLDER


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
