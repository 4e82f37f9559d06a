"""IMACS and detection: by hand, at the edges, and as properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import i2am
from i2am.detect import Box


def halves(left, right, size=(8, 8)):
    x = torch.full(size, float(left))
    x[:, size[1] // 2 :] = right
    return x


def test_imacs_by_hand():
    mask = halves(1, 0)
    assert i2am.imacs(halves(5, 1), mask) == pytest.approx(1)
    assert i2am.imacs(halves(1, 5), mask) == pytest.approx(-3)
    assert i2am.imacs(torch.full((8, 8), 7.0), mask) == 0
    assert i2am.imacs(halves(5, 1), torch.ones(8, 8)) == pytest.approx(0.5)  # no outside: no outside term
    quarter = torch.zeros(8, 8)
    quarter[:4, :4] = 1
    assert i2am.imacs(halves(5, 1), quarter) == pytest.approx(1 - 3 * 16 / 48)


def test_imacs_threshold_is_after_the_second_normalisation():
    a = torch.tensor([[0.0, 0.4, 0.41, 1.0]], dtype=torch.float64)
    assert i2am.imacs(a, torch.tensor([[0.0, 1, 0, 0]])) == pytest.approx(0 - 3 * (0.41 + 1.0) / 3)
    assert i2am.imacs(a, torch.tensor([[0.0, 0, 1, 0]])) == pytest.approx(0.41 - 3 * 1.0 / 3)


def test_imacs_soft_masks_are_weights():
    a, mask = halves(1, 0), halves(0.5, 0.25)
    assert i2am.imacs(a, mask) == pytest.approx(0.5 * 32 / 24 - 3 * (0.5 * 32) / (64 - 24))


def test_imacs_flags_of_the_published_script():
    mask = halves(1, 0)
    assert i2am.imacs(halves(1, 5), mask, complement=True) == pytest.approx(1)
    assert i2am.imacs(halves(5, 5.0) + torch.arange(8.0), mask, premultiply=True) > 0


def test_imacs_batches():
    maps = torch.stack([halves(5, 1), halves(1, 5)])
    assert i2am.imacs(maps, halves(1, 0)).tolist() == pytest.approx([1, -3])
    assert i2am.imacs(maps[0], torch.stack([halves(1, 0), halves(0, 1)])).tolist() == pytest.approx([1, -3])


@pytest.mark.parametrize(
    ("map", "mask", "message"),
    [
        (torch.ones(4, 4), torch.zeros(4, 4), "empty mask"),
        (torch.ones(4, 4), torch.full((4, 4), 255.0), r"\[0, 1\]"),
        (torch.full((4, 4), float("nan")), torch.ones(4, 4), "nothing ran"),
        (torch.ones(4), torch.ones(4, 4), r"must be \[h, w\]"),
        (torch.ones(2, 4, 4), torch.ones(3, 4, 4), "2 maps, but 3 masks"),
    ],
)
def test_imacs_refusals(map, mask, message):
    with pytest.raises(ValueError, match=message):
        i2am.imacs(map, mask)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 10**6), st.floats(0.1, 100), st.floats(-50, 50))
def test_imacs_range_and_invariance(h, w, seed, scale, shift):
    rng = np.random.default_rng(seed)
    a, mask = torch.from_numpy(rng.random((h, w))), torch.from_numpy((rng.random((2 * h, 3 * w)) > 0.5).astype(float))
    mask[0, 0] = 1
    score = i2am.imacs(a, mask).item()
    assert -3 - 1e-9 <= score <= 1 + 1e-9
    assert i2am.imacs(scale * a + shift, mask).item() == pytest.approx(score, abs=1e-6)


def test_detect_box():
    x = torch.zeros(40, 60)
    x[10:20, 25:45] = 1.0
    x[0:2, :] = 5.0  # the border lies often
    x[30, 5] = 3.0  # and specks
    assert i2am.detect_box(x.clamp_max(1)) == Box(10, 25, 20, 45)
    assert i2am.detect_box(torch.ones(10, 10)) is None
    assert i2am.detect_box(x.T.clamp_max(1)) == Box(25, 10, 45, 20)


def test_detect_box_in_image_pixels():
    x = torch.zeros(16, 16)
    x[4:8, 6:12] = 1
    box = i2am.detect_box(x, size=(128, 256))
    assert box.iou(Box(32, 96, 64, 192)) > 0.85


def test_detect_box_takes_the_largest():
    x = torch.zeros(30, 30)
    x[4:8, 4:8], x[12:20, 12:20] = 1, 0.8
    assert i2am.detect_box(x) == Box(12, 12, 20, 20)
    with pytest.raises(ValueError, match="threshold"):
        i2am.detect_box(x, threshold=1.0)
    with pytest.raises(ValueError, match="one finite map"):
        i2am.detect_box(x[None])


def test_iou():
    assert Box(0, 0, 2, 2).iou(Box(0, 0, 2, 2)) == 1
    assert Box(0, 0, 2, 2).iou(Box(2, 2, 4, 4)) == 0
    assert Box(0, 0, 2, 2).iou(Box(1, 1, 3, 3)) == pytest.approx(1 / 7)
