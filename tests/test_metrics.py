"""IMACS and detection: by hand, at the edges, and as properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import i2am
from i2am import metrics
from i2am.detect import Box, otsu
from tests.helpers.resize import bicubic


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
        (torch.full((4, 4), float("nan")), torch.ones(4, 4), "16 of its 16 values are NaN.*nothing ran.*not_finite"),
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
    for wrong in (1.0, 0, "mean"):
        with pytest.raises(ValueError, match="threshold"):
            i2am.detect_box(x, threshold=wrong)
    with pytest.raises(ValueError, match="logarithms"):
        i2am.detect_box(x - 0.1)
    assert i2am.detect_box(x[None]) == [Box(12, 12, 20, 20)]


def test_detect_box_sees_past_peaks():
    """What R2G looks like: an object at twice the surroundings, and a few cells at forty times."""
    noise = torch.rand(40, 60, generator=torch.Generator().manual_seed(0))
    x = 1 + 0.2 * noise
    x[10:30, 15:45] *= 2.5
    x[10:12, 15:17], x[28:30, 43:45] = 40, 40
    truth = Box(10, 15, 30, 45)
    assert i2am.detect_box(x) == truth
    blinded = i2am.detect_box(x, threshold=0.4)
    assert blinded is None or blinded.iou(truth) < 0.1


def test_otsu_separates_two_groups():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0, 1, 300), rng.normal(8, 1, 100)
    assert low.max() < otsu(np.concatenate([high, low])) < high.min()
    candidates = np.sort(rng.random(50))
    between = [(candidates[:i].mean() - candidates[i:].mean()) ** 2 * i * (50 - i) for i in range(1, 50)]
    best = 1 + int(np.argmax(between))
    assert candidates[best - 1] < otsu(candidates) < candidates[best]


def test_iou():
    assert Box(0, 0, 2, 2).iou(Box(0, 0, 2, 2)) == 1
    assert Box(0, 0, 2, 2).iou(Box(2, 2, 4, 4)) == 0
    assert Box(0, 0, 2, 2).iou(Box(1, 1, 3, 3)) == pytest.approx(1 / 7)


# ------------------------------------------------------------------------- a coarse map against a finer mask

COARSE = np.random.default_rng(7).random((2, 5, 4)) ** 3  # two maps; spiky, so that bicubic over- and undershoots
FINE = np.random.default_rng(8).random((2, 15, 22)) > 0.6


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


def at_fine(x):
    return bicubic(x, FINE.shape[1:])


def test_resizing_is_bicubic_and_not_linear():
    """The data tells the methods apart: else the tests below would say nothing."""
    smooth = torch.nn.functional.interpolate(torch.from_numpy(COARSE[:1, None]), (15, 22), mode="bilinear")[0, 0]
    assert np.abs(at_fine(COARSE[0]) - smooth.numpy()).max() > 0.05
    assert at_fine(COARSE[0]).min() < -0.02


@pytest.mark.parametrize("flags", [{}, {"complement": True}, {"premultiply": True}])
def test_imacs_of_a_coarse_map(flags):
    got = i2am.imacs(torch.from_numpy(COARSE), torch.from_numpy(FINE), **flags)
    for score, map, mask in zip(got, COARSE, FINE, strict=True):
        a = at_fine(scaled(-map if "complement" in flags else map))
        a = scaled(a * mask if "premultiply" in flags else a)
        a[a <= 0.4] = 0
        want = a[mask].sum() / mask.sum() - 3 * a[~mask].sum() / (~mask).sum()
        assert score.item() == pytest.approx(want, abs=1e-9)
        if "premultiply" in flags:
            assert a[~mask].sum() == 0 or a[~mask].min() >= 0


def test_imacs_of_a_fine_map_and_a_coarse_mask():
    map, mask = np.random.default_rng(1).random((12, 9)), np.arange(12).reshape(3, 4) / 11
    a = scaled(bicubic(scaled(map), (3, 4)))
    a[a <= 0.4] = 0
    want = (a * mask).sum() / mask.sum() - 3 * (a * (1 - mask)).sum() / (1 - mask).sum()
    assert i2am.imacs(map, mask).item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.7])
def test_ious_of_a_coarse_map(threshold):
    iou, mean = (f(COARSE, FINE, threshold) for f in (metrics.mask_iou, metrics.mean_iou))
    for i, (map, mask) in enumerate(zip(COARSE, FINE, strict=True)):
        hot = scaled(at_fine(map)) > threshold
        inside = (hot & mask).sum() / (hot | mask).sum()
        outside = (~hot & ~mask).sum() / (~hot | ~mask).sum()
        assert iou[i].item() == pytest.approx(inside)
        assert mean[i].item() == pytest.approx((inside + outside) / 2)


def test_contrast_of_a_peak_is_not_negative():
    """Bicubic rings below zero around one hot cell: a mean of the map must not."""
    map, mask = np.zeros((5, 4)), np.zeros((15, 22))
    map[2, 1], mask[:3, :4] = 1, 1  # the mask lies where the ringing is
    clamped = np.clip(at_fine(map), 0, None)
    want = (clamped[:3, :4].mean()) / clamped[mask == 0].mean()
    assert metrics.contrast(map, mask).item() == pytest.approx(want, abs=1e-9)
    soft = np.random.default_rng(2).random((15, 22))
    clamped = np.clip(at_fine(COARSE[0]), 0, None)
    want = (clamped * soft).sum() / soft.sum() / ((clamped * (1 - soft)).sum() / (1 - soft).sum())
    assert metrics.contrast(COARSE[0], soft).item() == pytest.approx(want, rel=1e-5)


def test_pointing_and_ranking_of_a_coarse_map():
    pointed, ranked = metrics.pointing_game(COARSE, FINE), metrics.ranking_auc(COARSE, FINE)
    for i, (map, mask) in enumerate(zip(COARSE, FINE, strict=True)):
        fine = at_fine(map)
        assert pointed[i].item() == mask.flat[fine.argmax()]
        pairs = fine[mask][:, None] - fine[~mask][None]
        assert ranked[i].item() == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean(), abs=1e-12)


def test_tolerance_is_in_pixels_of_the_mask_along_both_axes():
    map, mask = torch.zeros(8, 12), torch.zeros(8, 12)
    map[5, 5], mask[2, 2] = 1, 1
    found = [metrics.pointing_game(map, mask, tolerance=n).item() for n in range(5)]
    assert found == [0, 0, 0, 1, 1]
    assert metrics.pointing_game(map, (mask * 0.5 + 0.4), tolerance=0) == 0  # 0.4 is outside, 0.9 inside


def test_half_is_outside():
    mask = torch.tensor([[0.5, 0.51, 1.0, 0.0]])
    assert metrics.mask_iou(torch.tensor([[1.0, 1, 1, 0]]), mask) == pytest.approx(2 / 3)
    assert metrics.ranking_auc(torch.tensor([[1.0, 0.9, 0.8, 0]]), mask) == pytest.approx(0.5)


def test_one_map_of_many_masks_and_many_of_one():
    many = metrics.contrast(COARSE[0], FINE)
    assert many.tolist() == [metrics.contrast(COARSE[0], mask).item() for mask in FINE]
    for score in (metrics.mask_iou, metrics.pointing_game, metrics.ranking_auc, i2am.imacs):
        assert score(COARSE[0], FINE).tolist() == pytest.approx([score(COARSE[0], m).item() for m in FINE])
        assert score(COARSE[:1], FINE[0]).shape == (1,)


def test_the_box_is_found_in_the_pixels_that_it_is_given_in():
    """A 32² map and a 128² mask of one box agree; map cells are not pixels."""
    map = torch.zeros(32, 32)
    map[8:20, 4:16] = 1
    assert i2am.detect_box(map, size=(128, 128)).iou(Box(32, 16, 80, 64)) > 0.95
    assert i2am.detect_box(map, size=(64, 128)).iou(Box(16, 16, 40, 64)) > 0.95
    assert i2am.detect_box(map) == Box(8, 4, 20, 16)


def test_a_whisker_is_no_part_of_the_box():
    x = torch.zeros(40, 40)
    x[10:20, 10:20] = 1
    x[14, 20:36] = 1  # one pixel high: opened away, all but the pixel that touches
    assert i2am.detect_box(x) == Box(10, 10, 20, 21)


def test_the_border_of_two_pixels_does_not_count():
    x = torch.zeros(40, 60)
    x[0:12, 50:60] = 1
    assert i2am.detect_box(x) == Box(2, 50, 12, 58)
    x = torch.zeros(40, 60)
    x[:2] = 1
    x[:, -2:] = 1
    assert i2am.detect_box(x) is None


def test_the_smallest_component_that_counts():
    x = torch.zeros(40, 50)
    x[10:14, 10:15] = 1  # 20 of 2000 cells: a hundredth
    assert i2am.detect_box(x) == Box(10, 10, 14, 15)
    assert i2am.detect_box(x, smallest=0.011) is None
    x[20:40, 20:] = 0.2
    assert i2am.detect_box(x, threshold=0.5) == Box(10, 10, 14, 15)
    assert i2am.detect_box(x, threshold=0.1) == Box(20, 20, 38, 48)


def test_a_share_is_of_the_range_and_not_of_the_maximum():
    x = torch.full((20, 20), 5.0)
    x[5:10, 5:10], x[12:17, 4:16] = 9, 6.5
    assert i2am.detect_box(x, threshold=0.5) == Box(5, 5, 10, 10)
    assert i2am.detect_box(x - 7, threshold=0.5) == Box(5, 5, 10, 10)  # a share takes negative maps too


def test_otsu_takes_logarithms():
    """Levels 1, 30 and 1000 in a quarter each (and the rest): in logarithms 30 is nearer to 1000 than to 1."""
    x = torch.ones(40, 40)
    x[4:20, 4:36], x[6:12, 6:12] = 100, 1000
    assert i2am.detect_box(x) == Box(4, 4, 20, 36)
    x[30, 30] = 0  # the logarithm of zero is floored at 1e-4 of the maximum
    assert i2am.detect_box(x) == Box(4, 4, 20, 36)


def test_box_iou_of_boxes_that_only_touch_along_one_axis():
    assert Box(0, 0, 4, 4).iou(Box(5, 1, 8, 3)) == 0
    assert Box(0, 0, 4, 4).iou(Box(1, 5, 3, 8)) == 0
    assert Box(0, 0, 4, 8).iou(Box(2, 4, 6, 8)) == pytest.approx(8 / (32 + 16 - 8))


# ------------------------------------------------------------------------------------------------------ localisation


def corner(size, h, w):
    x = torch.zeros(size)
    x[:h, :w] = 1
    return x


def test_mask_iou_by_hand():
    mask = corner((8, 8), 4, 4)
    assert metrics.mask_iou(corner((8, 8), 4, 8) * 7 - 3, mask) == pytest.approx(16 / 32)
    assert metrics.mask_iou(corner((8, 8), 4, 8) * 0.3 + mask, mask) == 1  # 0.3 of 1.3 is below the threshold
    assert metrics.mask_iou(corner((8, 8), 4, 8) * 0.3 + mask, mask, threshold=0.2) == 0.5
    assert metrics.mask_iou(torch.full((3, 3), 0.1), mask) == 0  # resized, and still constant
    assert metrics.mask_iou(torch.ones(8, 8), mask) == 0


def test_mean_iou_counts_both_classes():
    mask = corner((8, 8), 4, 4)
    assert metrics.mean_iou(corner((8, 8), 4, 8), mask) == pytest.approx((16 / 32 + 32 / 48) / 2)
    assert metrics.mean_iou(torch.ones(8, 8), mask) == pytest.approx((0 + 48 / 64) / 2)
    assert metrics.mean_iou(corner((8, 8), 4, 8), torch.ones(8, 8)) == 0.5  # one class only


def test_box_iou():
    truth = [Box(0, 0, 2, 2), Box(0, 0, 4, 4)]
    assert metrics.box_iou([Box(1, 1, 3, 3), None], truth).tolist() == pytest.approx([1 / 7, 0])
    with pytest.raises(ValueError, match="1 boxes found, but 2"):
        metrics.box_iou([None], truth)
    with pytest.raises(ValueError, match="area"):
        metrics.box_iou([None], [Box(3, 3, 3, 5)])


def test_pointing_game():
    mask = corner((8, 8), 2, 2)
    map = torch.zeros(8, 8)
    map[2, 2] = 1
    assert metrics.pointing_game(map, mask) == 0
    assert metrics.pointing_game(map, mask, tolerance=1) == 1
    map[0, 0] = 1
    assert metrics.pointing_game(map, mask) == 0.5
    for constant in (torch.full((8, 8), 0.1), torch.full((3, 3), 0.1)):
        assert metrics.pointing_game(constant, mask) == pytest.approx(4 / 64)
    with pytest.raises(ValueError, match="tolerance"):
        metrics.pointing_game(map, mask, tolerance=-1)


def test_contrast():
    mask = corner((8, 8), 4, 8)
    assert metrics.contrast(1 + 2 * mask, mask) == pytest.approx(3)
    assert metrics.contrast(mask, mask) == float("inf")
    assert metrics.contrast(torch.zeros(8, 8), mask) == 1
    assert metrics.contrast(torch.full((3, 3), 0.1), mask) == pytest.approx(1)
    with pytest.raises(ValueError, match="negative"):
        metrics.contrast(mask - 1, mask)
    with pytest.raises(ValueError, match="no outside"):
        metrics.contrast(mask, torch.ones(8, 8))


def test_ranking_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(3)
    map, mask = torch.from_numpy(rng.integers(0, 5, (2, 6, 7))), torch.from_numpy(rng.random((2, 6, 7)) > 0.6)
    for a, m, score in zip(map, mask, metrics.ranking_auc(map, mask.float()), strict=True):
        pairs = a[m][:, None] - a[~m][None]
        assert score == pytest.approx(((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item())
    half = corner((8, 8), 4, 8)
    assert metrics.ranking_auc(half, half) == 1
    assert metrics.ranking_auc(-half, half) == 0
    assert metrics.ranking_auc(torch.full((3, 3), 0.1), half) == 0.5
    with pytest.raises(ValueError, match="both"):
        metrics.ranking_auc(half, torch.ones(8, 8))


@pytest.mark.parametrize("score", [metrics.mask_iou, metrics.mean_iou, metrics.pointing_game, metrics.ranking_auc])
def test_localisation_batches_like_imacs(score):
    maps, mask = torch.rand(3, 4, 4), corner((8, 8), 3, 5)
    together = score(maps, mask)
    assert together.shape == (3,)
    assert together.tolist() == pytest.approx([score(m, mask).item() for m in maps])
    with pytest.raises(ValueError, match="empty mask"):
        score(maps, torch.zeros(8, 8))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_wrong_thresholds(threshold):
    with pytest.raises(ValueError, match="threshold"):
        metrics.mask_iou(torch.rand(4, 4), torch.ones(4, 4), threshold)


# ---------------------------------------------------------------------------------------------------- correspondence


def test_correspondence_error_in_pixels():
    found = torch.tensor([[1.5, 2.0], [0.5, 0.5]])
    truth = torch.tensor([[6.0, 11.0], [float("nan"), 3.0]])
    error = metrics.correspondence_error(found, truth, scale=4)
    assert error[0] == pytest.approx(3)
    assert error[1].isnan()
    assert metrics.correspondence_error(found, truth, scale=(4, 5.5))[0] == pytest.approx(0)
    with pytest.raises(ValueError, match="alike"):
        metrics.correspondence_error(found, truth[:1])
    with pytest.raises(ValueError, match="finite"):
        metrics.correspondence_error(truth, truth)


def test_pck():
    error = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    assert metrics.pck(error, 2) == pytest.approx(2 / 3)
    assert metrics.pck(error, 0.5) == 0
    with pytest.raises(ValueError, match="no error is known"):
        metrics.pck(error[3:], 2)
    with pytest.raises(ValueError, match="at least 0"):
        metrics.pck(error, -1)


# ------------------------------------------------------------------------------------------------------ faithfulness

SHARES = (0.0, 0.25, 0.5, 1.0)


def total_weight(weights):
    return lambda removed: (weights * removed).flatten(1).sum(1)


def test_deletion_and_insertion_by_hand():
    weights = torch.tensor([[[8.0, 4.0], [2.0, 1.0]]])
    change = total_weight(weights)
    assert metrics.removal_curve(weights, change, shares=SHARES).tolist() == [[0, 8, 12, 15]]
    assert metrics.removal_curve(weights, change, shares=SHARES, order="opposite").tolist() == [[0, 1, 3, 15]]
    assert metrics.removal_curve(weights, change, shares=SHARES, insertion=True).tolist() == [[15, 7, 3, 0]]
    curve = torch.tensor([[0.0, 8, 12, 15]])
    assert metrics.area(curve, SHARES) == pytest.approx(0.25 * 4 + 0.25 * 10 + 0.5 * 13.5)
    assert metrics.area(curve[:, 1:3], SHARES[1:3]) == pytest.approx(10)  # per unit of share


def test_every_map_of_a_batch_has_its_own_order():
    weights = torch.rand(5, 4, 4)
    curve = metrics.removal_curve(weights, total_weight(weights), shares=SHARES)
    top = weights.flatten(1).sort(1, descending=True).values.cumsum(1).double()
    assert torch.allclose(curve[:, 1:], top[:, [3, 7, 15]], atol=1e-6)


def test_random_order_and_ties():
    weights = torch.arange(16.0).reshape(1, 4, 4).repeat(400, 1, 1)
    draws = torch.Generator().manual_seed(0)
    for maps, order in ((weights, "random"), (torch.ones_like(weights), "map"), (torch.ones_like(weights), "opposite")):
        half = metrics.removal_curve(maps, total_weight(weights), shares=SHARES, order=order, generator=draws)[:, 2]
        assert half.mean() == pytest.approx(60, abs=2)  # half of what there is, not the first half of the scan lines
        assert half.std() > 5
    again = torch.Generator().manual_seed(0)
    first = metrics.removal_curve(weights, total_weight(weights), order="random", generator=again)
    again.manual_seed(0)
    assert torch.equal(first, metrics.removal_curve(weights, total_weight(weights), order="random", generator=again))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(map=torch.rand(4, 4)), r"\[B, h, w\]"),
        (dict(map=torch.full((1, 4, 4), float("nan"))), "finite"),
        (dict(order="backwards"), "order"),
        (dict(shares=(0.5, 0.2)), "rise"),
        (dict(shares=(0.0, 1.2)), "rise"),
        (dict(change=lambda removed: removed.float().mean()), "one number a map"),
    ],
)
def test_removal_curve_refusals(arguments, message):
    maps = torch.rand(2, 4, 4)
    with pytest.raises(ValueError, match=message):
        metrics.removal_curve(**(dict(map=maps, change=total_weight(maps)) | arguments))


def test_area_refusals():
    with pytest.raises(ValueError, match="3 points"):
        metrics.area(torch.zeros(2, 3), SHARES)
