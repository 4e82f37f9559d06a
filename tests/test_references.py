"""References, layer filters, guidance: what callers may say, and what is refused."""

import pytest
import torch

from i2am.references import Reference, choose_layers
from i2am.tracing.guidance import Guidance


@pytest.mark.parametrize("grid", [(0, 3), (3,), (2, 3, 4), (2.0, 3), (-1, 2)])
def test_grids_that_are_none(grid):
    with pytest.raises(ValueError, match=r"grid must be \(height, width\)"):
        Reference(grid=grid)


@pytest.mark.parametrize("skip", [-1, 1.5, None])
def test_skips_that_are_none(skip):
    with pytest.raises(ValueError, match="skip must be"):
        Reference(skip=skip)


def test_reference_counts_its_tokens():
    assert Reference().count(7) == 7
    assert Reference(tokens=slice(2, None)).count(7) == 5
    assert Reference(tokens=[0, 6]).count(7) == 2
    assert Reference(tokens=torch.tensor([True, False, True])).count(3) == 2


def test_reference_checks_the_keys():
    Reference(grid=(2, 3)).check(6)
    Reference(grid=[2, 3], skip=1).check(7)
    Reference().check(1)
    with pytest.raises(ValueError, match="selects none of the 4 keys"):
        Reference(tokens=slice(4, 9)).check(4)
    with pytest.raises(ValueError, match=r"makes 6 tokens, but 7 of the 77 keys"):
        Reference(grid=(2, 3), tokens=slice(0, 7)).check(77)


NAMES = ["down.0.attn2", "down.1.attn2", "mid.attn2", "up.0.attn2"]


def test_choose_layers():
    assert choose_layers(NAMES, None) == NAMES
    assert choose_layers(NAMES, "down.*") == NAMES[:2]
    assert choose_layers(NAMES, ["up.*", "down.1.attn2"]) == [NAMES[1], NAMES[3]]  # execution order, not the filter's
    assert choose_layers(NAMES, lambda name: "mid" in name) == ["mid.attn2"]


@pytest.mark.parametrize(
    ("layers", "missing"),
    [("x.*", "'x.*'"), (["down.*", "y"], "'y'"), ([], "an empty list"), (lambda _: False, "the predicate")],
)
def test_filters_that_select_nothing_say_what_there_is(layers, missing):
    with pytest.raises(ValueError, match=missing.replace("*", r"\*") + " selects no layer; there are: down.0.attn2, "):
        choose_layers(NAMES, layers)


def latents(batch):
    return torch.randn(batch, 4, 2, 2)


def test_guidance_known_from_a_pipeline():
    guidance = Guidance("auto")
    assert guidance.conditional(latents(4), 2, 1) == slice(2, 4)
    assert guidance.conditional(latents(3), 3, 0) == slice(0, 1)
    assert guidance.conditional(latents(3), 1, 0) == slice(0, 3)
    same = torch.cat([latents(1)] * 2)  # two images of one seed, and no guidance: the pipeline knows
    assert guidance.conditional(same, 1, 0) == slice(0, 2)


def test_guidance_from_the_latents():
    x = latents(2)
    assert Guidance().conditional(torch.cat([x, x])) == slice(2, 4)
    assert Guidance().conditional(torch.cat([x, x, x])) == slice(0, 2)
    assert Guidance().conditional(torch.cat([x, x + 1e-6])) == slice(0, 4)
    assert Guidance("none").conditional(torch.cat([x, x])) == slice(0, 4)
    assert Guidance(0).conditional(latents(2)) == slice(0, 1)
    assert Guidance(2).conditional(latents(3)) == slice(2, 3)
    assert Guidance(1).conditional(latents(3), 3, 0) == slice(
        1, 2
    )  # three parts, as the pipeline says; the user's index


@pytest.mark.parametrize("mode", ["cond", -1, 1.0, True, None])
def test_guidance_modes_that_are_none(mode):
    with pytest.raises(ValueError, match="guidance must be"):
        Guidance(mode)
