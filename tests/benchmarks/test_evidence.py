"""The evidence: what is measured is what the page says, on models whose answer is known even without training."""

import json

import numpy as np
import pytest
import torch

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import enlarge, localise, report, subject, transfer
from i2am import zoo
from i2am.detect import Box
from i2am.zoo import data
from i2am.zoo.pipelines import build

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = subject.Setting(samples=2, batch=2, steps=1, short=1, draws=1)


# --------------------------------------------------------------------------------------------------------- intervals


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        mean, low, high = subject.interval(rng.normal(3, 1, 60), seed)
        assert low < mean < high
        hits += low < 3 < high
    assert 180 <= hits <= 199
    assert subject.interval([1.0, float("nan"), 3.0])[0] == 2
    with pytest.raises(ValueError, match="no sample"):
        subject.interval([float("nan")])


def test_rank_correlation():
    a = np.arange(30.0)
    assert subject.rank_correlation(a, -(a**3)) == pytest.approx([-1, -1, -1])
    rho, low, high = subject.rank_correlation(a, np.random.default_rng(1).random(30))
    assert low < 0 < high
    assert low < rho < high


def test_verdicts_need_intervals_that_are_apart():
    assert report.verdict([3, 2.5, 3.5], [2, 1.5, 2.4]) == "better than"
    assert report.verdict([2, 1.5, 2.4], [3, 2.5, 3.5]) == "worse than"
    assert report.verdict([2.5, 2, 3], [3, 2.9, 3.5]) == "not distinguishable from"


# ------------------------------------------------------------------------------------------------------- measurements


def test_psnr():
    truth = torch.zeros(2, 3, 8, 8)
    off = torch.stack([truth[0] + 0.2, truth[1] + 0.02])
    assert enlarge.psnr(off, truth).tolist() == pytest.approx([20, 40], abs=1e-4)  # 2 is the range


def test_fine_power_is_what_is_above_a_quarter_of_the_sampling_rate():
    x = torch.arange(64.0)
    slow, fast = (a * torch.cos(2 * torch.pi * f * x).expand(1, 3, 64, 64) for f, a in ((8 / 64, 1.0), (20 / 64, 0.5)))
    assert enlarge.fine_power(slow).item() < 1e-9
    assert enlarge.fine_power(fast).item() == pytest.approx(0.5**2 / 2)
    assert enlarge.fine_power(slow + fast).item() == pytest.approx(0.5**2 / 2)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert enlarge.fine_power(noise).item() == pytest.approx(1 - torch.pi / 16, abs=0.05)  # outside a disc


def test_pieces_are_of_held_out_photographs_as_they_are():
    found = enlarge.pieces(2)
    assert found.picture.shape == (6, 3, 128, 128)
    cat = data.photograph("chelsea.png")
    windows = cat.unfold(1, 128, 1).unfold(2, 128, 1)  # [3, y, x, 128, 128]
    assert (windows[:, :, :, 0, 0] == found.picture[0, :, None, None, 0, 0]).all(0).any()
    assert torch.allclose(found.reference, torch.nn.functional.avg_pool2d(found.picture, 4))


def test_enlargements_are_scored_against_bicubic(monkeypatch):
    """A model that paints the truth plus fine noise: the mean of eight has an eighth of the noise's power."""

    def noisy(pipe, sample, steps, generator):
        return sample.picture + 0.1 * torch.randn(sample.picture.shape, generator=generator)

    monkeypatch.setattr(enlarge, "paint", noisy)
    sample = zoo.samples("superres", 2, seed=1)
    truth = enlarge.fine_power(sample.picture).mean().item()
    rows = enlarge._scores(None, [sample])
    assert rows["one sample"]["psnr"][0] == pytest.approx(10 * np.log10(4 / 0.01), abs=0.1)
    assert rows["mean of 8"]["psnr"][0] - rows["one sample"]["psnr"][0] == pytest.approx(10 * np.log10(8), abs=0.1)
    assert rows["bicubic"]["gain"] == [0, 0, 0]
    assert rows["one sample"]["gain"][0] > 3
    assert rows["one sample"]["fine"][0] == pytest.approx(1 + 0.01 * (1 - np.pi / 16) / truth, rel=0.05)
    assert rows["bicubic"]["fine"][0] < 0.3


def test_masked_error_looks_at_the_object_only():
    task = zoo.samples("exemplar", 2)
    off = task.picture + 0.5 * task.object
    assert subject.masked_error(off, task).tolist() == pytest.approx([0.25, 0.25], abs=1e-6)
    assert subject.masked_error(task.picture + (1 - task.object), task).tolist() == [0, 0]
    assert subject.masked_ssim(task.picture, task).tolist() == pytest.approx([1, 1])
    assert (subject.masked_ssim(off, task) < 0.95).all()


def test_true_places_are_means_of_whole_cells():
    task = zoo.samples("tryon", 2)
    places = subject.true_places(task, (16, 16))
    known = task.object[:, 0].reshape(2, 16, 4, 16, 4).permute(0, 1, 3, 2, 4).flatten(3).bool().all(-1)
    assert torch.equal(known, ~places.isnan().any(-1))
    b, y, x = known.nonzero()[5]
    assert torch.allclose(places[b, y, x], task.source[b, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((0, 1)), atol=1e-3)


def test_stereo_truth_warps_one_view_into_the_other():
    (task,) = list(localise.stereo_tasks(subject.Setting(samples=16)))
    assert task.picture.shape == (16, 3, 64, 64)
    source = task.source.nan_to_num(0)
    errors = []
    for shift in (-2, 0, 2):
        moved = data.look_up(task.reference, source + torch.tensor([0, shift]))
        errors.append(subject.masked_change(moved, task.picture, task.object).mean())
    still = subject.masked_change(task.reference, task.picture, task.object).mean()
    assert errors[1] < 0.7 * min(errors[0], errors[2], still)
    residual = (task.source - task.pose)[..., 1][task.object[:, 0] > 0]
    assert residual.abs().median() < 4
    assert residual.std() > 0.5  # there is something to find


def test_muted_heads_are_silent_and_come_back():
    pipe, task = build("exemplar"), zoo.samples("exemplar", 1)
    whole = subject.paint(pipe, task, 1)
    layer = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    attention, seen = pipe.unet.get_submodule(layer), []
    handle = attention.to_out[0].register_forward_hook(lambda m, args, out: seen.append(args[0].unflatten(-1, (4, -1))))
    with subject.muted(pipe, {layer: [1, 3]}):
        some = subject.paint(pipe, task, 1)
    handle.remove()
    assert not torch.equal(some, whole)
    assert (seen[0][:, :, [1, 3]] == 0).all()
    assert (seen[0][:, :, [0, 2]] != 0).any()
    assert torch.equal(subject.paint(pipe, task, 1), whole)


def test_boxes():
    mask = torch.zeros(8, 8)
    mask[2:5, 3:7] = 1
    assert localise.box_of(mask) == Box(2, 3, 5, 7)
    rng = np.random.default_rng(0)
    for _ in range(20):
        box = localise.moved(Box(2, 3, 5, 7), rng, 8)
        assert (box.bottom - box.top, box.right - box.left) == (3, 4)
        assert min(box) >= 0
        assert max(box) <= 8


def test_perfect_and_blind_matches_score_so():
    task, perfect, blind = zoo.samples("tryon", 4), localise.Columns(), localise.Columns()
    truth = subject.true_places(task, (16, 16)).nan_to_num(0) / 4
    from i2am.maps.sram import Match

    localise.add_errors(perfect, "x", Match(truth, truth, None), task, 4)
    assert perfect.intervals()["x"]["best"][0] == pytest.approx(0, abs=1e-5)
    assert perfect.intervals()["x"]["pck"][0] == 1
    middle = torch.full_like(truth, 8.0)
    localise.add_errors(blind, "x", Match(expected=truth, best=middle, confidence=None), task, 4)
    scores = blind.intervals()["x"]
    assert scores["best"][0] > 5
    assert scores["mean"][0] == pytest.approx(0, abs=1e-5)
    assert scores["pck"][0] < 0.5
    localise.add_chance(blind, task)
    assert blind.intervals()["a random place of the object"]["best"][0] > 10


def test_freezing_everything_keeps_the_picture_and_nothing_lets_it_go():
    pipe, task = build("exemplar"), zoo.samples("exemplar", 2)
    change = transfer._freeze(pipe, task, subject.Setting(short=2))
    everything = torch.ones(2, 16, 16, dtype=torch.bool)
    assert change(everything).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert (change(~everything) > 0).all()


def test_occluding_nothing_changes_nothing():
    pipe, task = build("exemplar"), zoo.samples("exemplar", 2)
    change = transfer._occlude(pipe, task, SMALL)
    nothing = torch.zeros(2, 16, 16, dtype=torch.bool)
    assert change(nothing).tolist() == [0, 0]
    assert (change(~nothing) > 0).all()


# ---------------------------------------------------------------------------------------------------------- the page


def test_a_part_is_measured_once_and_the_page_says_what_is_missing(tmp_path, monkeypatch):
    calls = []

    def stereo(setting):
        calls.append(setting)
        row = {"best": [2.0, 1.5, 2.5], "pck": [0.5, 0.4, 0.6]}
        told = {"best": [1.0, 0.5, 1.2], "pck": [0.9, 0.8, 1.0]}
        error = {"error": [0.1, 0.1, 0.1]}
        return {"finest decoder layers": row, "what the pose says": told, "right": error, "swapped": error}

    monkeypatch.setitem(command.PARTS, "stereo", stereo)
    for _ in range(2):
        page = command.measure(SMALL, ["stereo"], tmp_path / "state", tmp_path / "docs")
    assert len(calls) == 1
    text = page.read_text(encoding="utf-8")
    assert "| finest decoder layers | 2.00 [1.50, 2.50] | 0.50 [0.40, 0.60] |" in text
    assert "SRAM's best patch is worse than the pose" in text
    assert text.count("Not measured") == len(report.SECTIONS) - 1
    command.measure(SMALL, ["stereo"], tmp_path / "state", tmp_path / "docs", fresh=True)
    assert len(calls) == 2
    assert json.loads((tmp_path / "state" / "stereo.json").read_text())["seconds"] >= 0


def test_localisation_of_untrained_weights_is_worth_nothing(monkeypatch):
    """The measurement itself must not find the object: the mask reaches the model, but the maps must be its own."""
    monkeypatch.setattr(subject.Setting, "load", lambda self, name: build(name))
    found = localise.model("exemplar", subject.Setting(samples=16, batch=16, steps=1))
    rows = found["localisation"]
    assert rows["row softmax, mean over every key"]["auc"] == [0.5, 0.5, 0.5]
    assert rows["R2G (column softmax), all layers"]["contrast"][0] < 1.2
    assert found["correspondence"]["default layers"]["best"][0] > 10
    errors = found["used"]
    assert errors["right"]["error"][0] == pytest.approx(errors["swapped"]["error"][0], rel=0.1)
    sections = command.gathered({"exemplar": found, "stereo": {"x": 1}})
    assert sections["used"] == {"exemplar": errors}
    assert sections["stereo"] == {"x": 1}


@pytest.mark.slow
def test_quick_run_writes_the_whole_page(tmp_path):
    page = command.main(["--quick", "--state", str(tmp_path / "state"), "--docs", str(tmp_path / "docs")])
    text = page.read_text(encoding="utf-8")
    assert "Not measured" in text  # the ablation needs its own training run
    for picture in (line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")):
        assert (tmp_path / "docs" / picture).stat().st_size > 5000, picture
