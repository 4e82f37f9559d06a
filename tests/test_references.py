"""References, layer filters, guidance: what callers may say, and what is refused."""

import pytest
import torch

from i2am.references import Reference, choose_layers


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
    assert choose_layers(["a[0]", "a0"], "a[0]") == ["a[0]", "a0"]  # by its very name, and as a pattern
    assert choose_layers(NAMES, ["up.*", "down.1.attn2"]) == [NAMES[1], NAMES[3]]  # execution order, not the filter's
    assert choose_layers(NAMES, lambda name: "mid" in name) == ["mid.attn2"]


@pytest.mark.parametrize(
    ("layers", "missing"),
    [("x.*", "'x.*'"), (["down.*", "y"], "'y'"), ([], "an empty list"), (lambda _: False, "the predicate")],
)
def test_filters_that_select_nothing_say_what_there_is(layers, missing):
    with pytest.raises(ValueError, match=missing.replace("*", r"\*") + " selects no layer; there are: down.0.attn2, "):
        choose_layers(NAMES, layers)
