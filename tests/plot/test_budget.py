"""Areas of attention over time: each source's band has its share's height."""

import dataclasses

import numpy as np
import pytest
import torch

from i2am import plot
from i2am.maps import AttributionMaps
from i2am.maps.budget import REST, Budget
from tests.plot.test_plot import photograph, some_maps


def shares(layers=2):
    torch.manual_seed(0)
    x = torch.rand(2, 4, layers, 3).softmax(-1)
    x[:, 1] = float("nan")  # nothing ran in this group
    return Budget(["hat", "text", REST], [f"blocks.{i}" for i in range(layers)], x)


@pytest.mark.parametrize("layer", [None, "blocks.1"])
def test_bands_have_the_height_of_their_shares(layer):
    budget = shares()
    ax = plot.budget(budget, index=1, layer=layer)
    own = (budget.over_time() if layer is None else budget.shares[:, :, 1])[1].numpy()
    at = 0.0
    for band, share in zip(ax.collections, own[2], strict=True):  # at 62 % of the run
        points = band.get_paths()[0].vertices
        there = points[np.isclose(points[:, 0], 50)][:, 1]
        assert there.min() <= at + 1e-6
        at += share
        assert np.isclose(there, at, atol=1e-6).any()
    assert ax.get_ylim() == (0, 1)
    assert ax.get_xlabel() == "% of the run"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names[0].startswith("rest")  # as the bands lie, the first at the bottom
    assert names[-1] == f"hat  {100 * np.nanmean(own[:, 0]):.0f} %"


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no layer 'x'; there are: blocks\.0, blocks\.1"):
        plot.budget(shares(), layer="x")
    with pytest.raises(IndexError, match="index=2, but the budget holds 2 images"):
        plot.budget(shares(), index=2)
    with pytest.raises(ValueError, match="no step ran"):
        plot.budget(shares()._replace(shares=torch.full((1, 2, 1, 3), float("nan"))))


def test_a_panel_a_word():
    maps = some_maps()
    with pytest.raises(ValueError, match="no words were told apart"):
        plot.words(maps, photograph())
    told = [dataclasses.replace(s, reference="hat", kind="word", reference_grid=None) for s in maps._sums]
    figure = plot.words(AttributionMaps(told), photograph(), index=1)
    share = 100 * float(maps.ulam("mass")[1].mean())
    assert figure.axes[0].get_title() == f"hat\n{share:.2g} % of the attention"
    assert len(figure.axes[0].images) == 1
    assert not figure.axes[1].images
