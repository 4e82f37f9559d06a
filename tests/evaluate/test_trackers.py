"""Results shown live: what TensorBoard and Weights & Biases are told, and that an evaluation never fails for them."""

import importlib.util
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from i2am import cli
from i2am.cli import evaluate as command
from i2am.cli.arguments import SOME_FAILED
from i2am.cli.job import Job
from i2am.evaluate import Store, trackers
from i2am.evaluate.trackers import Target, Trackers, read_target
from tests.evaluate.test_evaluate import arguments, dataset, results  # noqa: F401 (a fixture)
from tests.evaluate.test_sharing import SETTINGS

pytest_plugins = ("tests.helpers.saved_pipelines",)
pytestmark = pytest.mark.usefixtures("one_thread")

OK = {"id": "b", "status": "ok", "imacs_r2g": 0.25, "box_iou": 0.5, "seconds": 2.0}
SUMMARY = {"samples": 2, "ok": 1, "failed": 1, "missing": 0, "versions": {}, "errors": {}}


@pytest.fixture
def store(tmp_path):
    """An open folder with a red preview of b."""
    store = Store(tmp_path / "out")
    store.open(SETTINGS)
    store.write(store.path("previews", "b", ".jpg"), lambda p: Image.new("RGB", (40, 10), "red").save(p, "jpeg"))
    yield store
    store.close()


def read_events(folder):
    """(scalars {tag: {step: value}}, pictures {tag: {step: image}}, texts) of one run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}
    pictures = {
        tag: {e.step: Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images(tag)}
        for tag in tags["images"]
    }
    texts = {tag: [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)] for tag in tags["tensors"]}
    return scalars, pictures, texts


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_scores_and_overlays_by_place(inpaint, dataset, tmp_path, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    out, logs = tmp_path / "out", tmp_path / "logs"
    original = command._traced

    def interrupted(job, sample):
        if sample.id == "c":
            raise KeyboardInterrupt
        return original(job, sample)

    monkeypatch.setattr(command, "_traced", interrupted)
    assert cli.main(arguments(inpaint, dataset, out, "--log", f"tensorboard:{logs}")) == 3
    (run,) = logs.iterdir()
    assert set(read_events(run)[0]["imacs_r2g"]) == {0, 1}  # what was done is written
    monkeypatch.setattr(command, "_traced", original)
    assert cli.main(arguments(inpaint, dataset, out, "--log", f"tensorboard:{logs}")) == SOME_FAILED
    assert list(logs.iterdir()) == [run]  # one evaluation, one run
    scalars, pictures, texts = read_events(run)
    table = results(out)
    for place, name in enumerate("abcdef"):
        assert scalars["failed"][place] == (name in "de")
        for score in ("imacs_r2g", "imacs_g2r", "box_iou"):
            assert (place in scalars[score]) == (name not in "de")
            if name not in "de":
                assert scalars[score][place] == pytest.approx(float(table[name][score]), abs=1e-6)
                preview = np.asarray(Image.open(out / "previews" / f"{name}.jpg"))
                assert np.array_equal(np.asarray(pictures["overlays"][place].convert("RGB")), preview)
    assert "4 of 6 samples, 2 failed" in texts["summary/text_summary"][-1]
    assert "overlays/id/text_summary" in texts
    capsys.readouterr()
    assert cli.main(arguments(inpaint, dataset, tmp_path / "three", "--log", f"tensorboard:{logs}", "--steps", 3)) == 1
    assert len(list(logs.iterdir())) == 2  # other settings: another run


def test_processes_have_runs_of_their_own(store, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    second = Store(tmp_path / "out")
    second.open(SETTINGS)
    monkeypatch.setattr(second, "others", lambda: [SimpleNamespace(pid=1)])
    shown = Trackers([Target("tensorboard")], second, {"b": 7}, SETTINGS)
    shown.sample(OK)
    shown.end()
    (run,) = (tmp_path / "out" / "tensorboard").iterdir()
    (own,) = run.iterdir()
    assert own.name == second.process
    assert read_events(own)[0]["imacs_r2g"] == {7: 0.25}
    second.close()
    assert trackers.run_name(store) == run.name


class StandIn:
    """What is used of wandb: ``init`` and ``Image``; of a run ``define_metric``, ``log``, ``summary``, ``finish``."""

    def __init__(self):
        self.logged, self.summary, self.finished, self.started = [], {}, 0, None
        self.Image = lambda picture, caption: (picture.size, caption)

    def init(self, *, project, group, name, job_type, dir, config):
        self.started = SimpleNamespace(project=project, group=group, name=name, job_type=job_type, config=config)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "sample")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_is_told_scores_overlays_and_means(store, monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    shown = Trackers([Target("wandb", "cups")], store, {"a": 0, "b": 1}, SETTINGS | {"steps": 3, "weights": {}})
    shown.sample({"id": "a", "status": "failed", "error": "x", "seconds": 1.0})
    shown.sample(OK)
    shown.end({**SUMMARY, "scores": {"imacs_r2g": {"mean": 0.25}}})
    shown.end()
    started = stand_in.started
    assert (started.project, started.group, started.name) == ("cups", trackers.run_name(store), started.group)
    assert started.config == SETTINGS | {"steps": 3}
    failed, good = stand_in.logged
    assert failed == {"sample": 0, "seconds": 1.0, "failed": 1.0}
    scores = {"imacs_r2g": 0.25, "box_iou": 0.5, "seconds": 2.0}
    assert good == {"sample": 1, **scores, "failed": 0.0, "overlays": ((40, 10), "b")}
    assert stand_in.summary == {"samples": 2, "ok": 1, "failed": 1, "missing": 0, "mean_imacs_r2g": 0.25}
    assert stand_in.finished == 1


@pytest.mark.slow
def test_wandb_takes_it_offline(store, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shown = Trackers([Target("wandb", "cups")], store, {"b": 1}, SETTINGS, pytest.fail)
    shown.sample(OK)
    shown.end({**SUMMARY, "scores": {"imacs_r2g": {"mean": 0.25}}})
    (run,) = (store.out / "wandb").glob("offline-run-*")
    (file,) = run.glob("run-*.wandb")
    assert b"cups" in file.read_bytes()
    (picture,) = run.rglob("*.png")
    assert Image.open(picture).size == (40, 10)
    assert wandb.run is None


def test_one_that_fails_is_given_up(store):
    told, good = [], []
    shown = Trackers([], store, {"b": 1}, SETTINGS, told.append)

    def failing(*_):
        raise OSError("the network is down")

    record = lambda *values: good.append(values[:2])  # noqa: E731
    shown._open = {
        Target("wandb"): SimpleNamespace(sample=failing, end=failing),
        Target("tensorboard"): SimpleNamespace(sample=record, end=lambda summary: good.append(summary)),
    }
    shown.sample(OK)
    shown.sample(OK)
    shown.end()
    assert told == ["--log wandb has stopped, results are kept as ever: OSError: the network is down"]
    assert good == [(1, "b"), (1, "b"), None]


@pytest.mark.parametrize(
    ("value", "words"),
    [("mlflow", ["tensorboard", "wandb"]), ("wandb", ["wandb is not installed", "i2am[wandb]"])],
)
def test_refused_before_anything_is_read(inpaint, dataset, tmp_path, capsys, monkeypatch, value, words):  # noqa: F811
    monkeypatch.setattr(Job, "of", lambda *_, **__: pytest.fail("too late"))
    folder = importlib.util.spec_from_loader("wandb", None, is_package=True)  # as of a folder named wandb
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder)
    assert cli.main(arguments(inpaint, dataset, tmp_path / "out", "--log", value)) == 2
    err = capsys.readouterr().err
    for word in ("--log", *words):
        assert word in err
    assert not (tmp_path / "out").exists()


def test_one_that_cannot_start_is_wrong_input(inpaint, dataset, tmp_path, capsys, monkeypatch):  # noqa: F811
    def refusing(*_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(Job, "load", lambda self: pytest.fail("weights were loaded"))
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", refusing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    assert cli.main(arguments(inpaint, dataset, tmp_path / "out", "--log", "tensorboard")) == 2
    assert "tensorboard cannot be started: RuntimeError: no API key" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "i2am.json").read_text())["command"] == "evaluate"


def test_targets():
    pytest.importorskip("tensorboard")
    assert read_target("tensorboard:a:b") == Target("tensorboard", "a:b")
