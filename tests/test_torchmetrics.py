"""IMACS and box IoU as torchmetrics' metrics: means over samples, whatever the batches, dtypes and processes."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from i2am import detect_box
from i2am.detect import Box
from i2am.evaluate.scores import score
from i2am.metrics import imacs

pytest.importorskip("torchmetrics", reason='torchmetrics is not installed: pip install "i2am[torchmetrics]"')
from torchmetrics import MetricCollection

from i2am.torchmetrics import IMACS, UNIT, BoxIoU

ROOT = Path(__file__).resolve().parents[1]


def batch(count=6, seed=0):
    """R2G-like maps 16×20 with an object each, and masks of other sizes around it that fit more or less."""
    rng = np.random.default_rng(seed)
    maps, masks = torch.from_numpy(1 + 0.2 * rng.random((count, 16, 20))), torch.zeros(count, 48, 40)
    for i in range(count):
        top, left = rng.integers(2, 7), rng.integers(2, 9)
        maps[i, top : top + 7, left : left + 8] *= 3
        masks[i, 3 * top : 3 * top + 21, 2 * left + i % 3 : 2 * left + 16] = 1
    return maps, masks


def truth(maps, masks, name):
    """The mean of the very scores that `i2am evaluate` keeps of each sample."""
    return float(np.mean([score(a, None, m)[name] for a, m in zip(maps, masks, strict=True)]))


METRICS = [(IMACS, "imacs_r2g"), (BoxIoU, "box_iou")]


@pytest.mark.parametrize(("kind", "name"), METRICS)
def test_the_mean_over_samples_whatever_the_batches(kind, name):
    """Batches of 1, 3 and 2: a mean of batches' means would be another number."""
    maps, masks = batch()
    want = truth(maps, masks, name)
    assert 0.05 < abs(want) < 0.99
    found = []
    for parts in ([6], [1, 3, 2], [2] * 3, [1] * 6):
        metric = kind()
        for a, m in zip(maps.split(parts), masks.split(parts), strict=True):
            metric.update(a, m[:, None])
        found.append(metric.compute())
    assert found[0].item() == pytest.approx(want, abs=1e-6)
    assert len({x.item() for x in found}) == 1  # to the last bit
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize(("kind", "name"), METRICS)
def test_forward_gives_the_batch_and_keeps_the_sum(kind, name):
    maps, masks = batch()
    metric = kind()
    assert metric(maps[:2], masks[:2]).item() == pytest.approx(truth(maps[:2], masks[:2], name), abs=1e-6)
    assert metric(maps[2], masks[2]).item() == pytest.approx(truth(maps[2:3], masks[2:3], name), abs=1e-6)  # one alone
    assert metric.compute().item() == pytest.approx(truth(maps[:3], masks[:3], name), abs=1e-6)
    metric.reset()
    metric.update(maps[4:], masks[4:])
    assert metric.compute().item() == pytest.approx(truth(maps[4:], masks[4:], name), abs=1e-6)


@pytest.mark.parametrize(("kind", "name"), METRICS)
def test_half_precision_maps_and_a_model_that_is_cast(kind, name):
    """Sums stay exact where a loop's module, its metrics with it, is cast; halves would soon add no more."""
    maps, masks = batch()
    want = truth(maps.bfloat16().double(), masks, name)
    module = nn.ModuleDict({"metric": kind(), "layer": nn.Linear(2, 2)})
    module.to(torch.bfloat16)
    module["metric"].set_dtype(torch.float16)
    for _ in range(400):
        module["metric"]._add(torch.tensor([0.25, 0.5]))
    module["metric"].update(maps.bfloat16(), masks.bfloat16())
    total = 300 + 6 * want
    assert module["metric"].compute().item() == pytest.approx(total / 806, abs=1e-6)


def test_what_imacs_is_asked_for():
    maps, masks = batch()
    for options in (dict(complement=True), dict(premultiply=True)):
        metric = IMACS(**options)
        metric.update(maps, masks)
        assert metric.compute().item() == pytest.approx(imacs(maps, masks, **options).mean().item(), abs=1e-6)
    metric = IMACS()
    metric.update(maps, masks[0])  # one mask for all
    assert metric.compute().item() == pytest.approx(imacs(maps, masks[0]).mean().item(), abs=1e-6)
    assert int(metric.count) == 6


def test_true_boxes_in_pixels_of_the_picture():
    maps, masks = batch(3)
    boxes = [Box(6, 8, 30, 28), Box(0, 0, 20, 20), Box(9, 3, 40, 33)]
    found = detect_box(maps, size=(48, 40))
    want = np.mean([f.iou(b) for f, b in zip(found, boxes, strict=True)])
    for given in (boxes, torch.tensor(boxes), np.array(boxes), [list(b) for b in boxes]):
        metric = BoxIoU()
        metric.update(maps, boxes=given, size=(48, 40))
        assert metric.compute().item() == pytest.approx(want, abs=1e-6)
    metric = BoxIoU()
    metric.update(maps, masks, boxes=boxes)  # the boxes count, in the masks' pixels
    assert metric.compute().item() == pytest.approx(want, abs=1e-6)
    metric.reset()
    metric.update(maps[0], boxes=detect_box(maps[0]))  # without a size: in the map's own cells
    assert metric.compute() == 1
    metric.reset()
    metric.update(torch.ones(2, 9, 9), boxes=Box(1, 1, 4, 4))  # nothing is found in constant maps; one box for both
    assert metric.compute() == 0
    assert int(metric.count) == 2


def test_thresholds_are_those_of_detect_box():
    maps, masks = batch()
    maps[:, 1, 1] = 40  # a peak that a share of the maximum cannot see past
    blind = BoxIoU(threshold=0.4)
    blind.update(maps, masks)
    assert blind.compute() < 0.2
    sees = BoxIoU()
    sees.update(maps, masks)
    assert sees.compute() > 0.5
    none = BoxIoU(smallest=0.9)
    none.update(maps, masks)
    assert none.compute() == 0
    for wrong in (1.0, 0, "mean", float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            BoxIoU(threshold=wrong)
    with pytest.raises(ValueError, match="Unexpected keyword"):
        IMACS(complementary=True)


@pytest.mark.parametrize("kind", [IMACS, BoxIoU])
def test_no_sample_is_an_error(kind):
    metric = kind()
    with (
        pytest.warns(UserWarning, match="compute"),
        pytest.raises(ValueError, match=f"{kind.__name__} has seen no sample"),
    ):
        metric.compute()
    maps, masks = batch()
    metric.update(maps, masks)
    metric.compute()
    metric.reset()
    with pytest.warns(UserWarning, match="compute"), pytest.raises(ValueError, match="no sample"):
        metric.compute()


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (IMACS, (torch.ones(2, 4, 4), torch.zeros(2, 4, 4)), "empty mask"),
        (IMACS, (torch.ones(2, 4, 4), torch.ones(3, 4, 4)), "2 maps, but 3 masks"),
        (IMACS, (torch.full((4, 4), float("nan")), torch.ones(4, 4)), "not finite"),
        (IMACS, (torch.ones(0, 4, 4), torch.ones(0, 4, 4)), r"\[B, h, w\]"),
        (BoxIoU, (torch.rand(2, 9, 9), torch.zeros(2, 9, 9)), "empty mask"),
        (BoxIoU, (torch.rand(2, 9, 9), torch.ones(3, 9, 9)), "2 maps, but 3 masks"),
        (BoxIoU, (torch.rand(2, 9, 9) - 2, torch.ones(2, 9, 9)), "logarithms"),
        (BoxIoU, (torch.rand(2, 9, 9),), "masks or with boxes"),
        (BoxIoU, (torch.rand(3, 9, 9), None, [Box(0, 0, 1, 1)] * 2), "3 maps, but 2 true boxes"),
        (BoxIoU, (torch.rand(9, 9), None, Box(3, 3, 3, 5)), "area"),
        (BoxIoU, (torch.rand(9, 9), None, [[0, 0, 1]]), "top, left, bottom, right"),
        (BoxIoU, (torch.rand(9, 9), None, [0, 0, float("nan"), 1]), "finite"),
        (BoxIoU, (torch.rand(9, 9), None, "0 0 1 1"), "top, left, bottom, right"),
        (BoxIoU, (torch.rand(9, 9), torch.ones(18, 18), None, (18, 18)), "beside masks"),
    ],
)
def test_what_is_refused_changes_nothing(kind, arguments, words):
    maps, masks = batch()
    metric = kind()
    metric.update(maps, masks)
    before = metric.compute()
    keywords = dict(zip(("boxes", "size"), arguments[2:], strict=False))
    with pytest.raises(ValueError, match=words):
        metric.update(*arguments[:2], **keywords)
    assert metric.compute() == before
    assert int(metric.count) == 6


def test_in_a_collection_copied_and_saved():
    maps, masks = batch()
    both = MetricCollection({"imacs": IMACS(), "box": BoxIoU()})
    both.update(maps, masks)
    want = {"imacs": truth(maps, masks, "imacs_r2g"), "box": truth(maps, masks, "box_iou")}
    for collection in (both, copy.deepcopy(both), pickle.loads(pickle.dumps(both)), both.clone()):
        assert {n: x.item() for n, x in collection.compute().items()} == pytest.approx(want, abs=1e-6)
    metric, other = IMACS(), IMACS()
    metric.persistent(True)
    metric.update(maps, masks)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())  # a checkpoint in the middle of an epoch
    other.update(maps[:1], masks[:1])
    want = (6 * want["imacs"] + truth(maps[:1], masks[:1], "imacs_r2g")) / 7
    assert other.compute().item() == pytest.approx(want, abs=1e-6)
    assert UNIT * 2**63 / 3 > 10**8  # samples whose scores the sums can hold


# ---------------------------------------------------------------------------------------------------------- processes


def one_of_two(rank, port, answers):
    """What one of two processes does: its own part of the samples, batches of its own; the second one sees 1 of 6."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    maps, masks = batch()
    own = [range(2), range(2, 5)] if rank == 0 else [range(5, 6)]
    found = {}
    metrics = {"imacs_r2g": IMACS(), "box_iou": BoxIoU(), "step": IMACS(dist_sync_on_step=True), "idle": IMACS()}
    for part in own:
        for name in ("imacs_r2g", "box_iou"):
            metrics[name].update(maps[list(part)], masks[list(part)])
    found["step"] = metrics["step"](maps[rank : rank + 1], masks[rank : rank + 1]).item()
    if rank == 0:
        metrics["idle"].update(maps, masks)  # the other one has seen none
    for name in ("imacs_r2g", "box_iou", "idle"):
        found[name] = metrics[name].compute().item()
        assert int(metrics[name].count) == (5 if rank == 0 else 1) or name == "idle"  # its own again
    answers.put(found)
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(300)
def test_two_processes_agree_on_the_mean_of_all_samples(free_port):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, free_port, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    maps, masks = batch()
    want = {name: truth(maps, masks, name) for name in ("imacs_r2g", "box_iou")}
    want |= {"idle": want["imacs_r2g"], "step": truth(maps[:2], masks[:2], "imacs_r2g")}
    assert found[0] == found[1]
    assert found[0] == pytest.approx(want, abs=1e-6)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------------------------------------------ without it


@pytest.mark.parametrize(
    ("stub", "words"),
    [
        ("sys.modules['torchmetrics'] = None", 'torchmetrics is not installed: pip install "i2am[torchmetrics]"'),
        ("sys.path.insert(0, sys.argv[1])", "No module named 'of_its_own'"),
    ],
)
def test_the_hint_is_true(tmp_path, stub, words):
    """A package that is there and does not import is not called missing."""
    (tmp_path / "torchmetrics.py").write_text("import of_its_own\n")
    code = f"import sys; {stub}; import i2am.torchmetrics"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert words in done.stderr.splitlines()[-1]
    assert ("is not installed" in done.stderr) == ("None" in stub)
