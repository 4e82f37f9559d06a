"""Evaluation over a dataset: manifests, resuming, several processes, failures, and what is written."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am import cli
from i2am._files import machine
from i2am.cli import evaluate as command
from i2am.cli.arguments import SOME_FAILED, STOPPED
from i2am.cli.job import Job
from i2am.cli.processes import Process
from i2am.detect import box_of
from i2am.evaluate import Sample, Store, read_manifest, summarise
from i2am.evaluate import run as run_module
from i2am.evaluate.journal import Writer
from i2am.evaluate.manifest import derived_seed
from i2am.evaluate.scores import score
from i2am.evaluate.summary import interval
from i2am.evaluate.thumbnails import read_levels

pytest_plugins = ("tests.helpers.saved_pipelines",)  # the fixtures inpaint and images
pytestmark = pytest.mark.usefixtures("one_thread")

SCORES = ("imacs_r2g", "imacs_g2r", "box_iou")


@pytest.fixture
def dataset(images, tmp_path):
    """A manifest of six samples: d is broken, e names a file that is not there."""
    left = Image.new("L", (60, 40))
    left.paste(255, (0, 0, 30, 40))
    left.save(images / "left.png")
    rows = [
        dict(id="a", prompt="a cup"),
        dict(id="b", seed="7"),
        dict(id="c", box="8 8 40 40"),
        dict(id="d", image="broken.png"),
        dict(id="e", reference="nowhere.png"),
        dict(id="f"),
    ]
    common = dict(reference="reference.png", image="image.png", mask="mask.png", reference_mask="left.png")
    path = images / f"{tmp_path.name}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", *common, "prompt", "seed", "box"])
        writer.writeheader()
        writer.writerows(common | row for row in rows)
    return path


def arguments(inpaint, manifest, out, *more):
    pipeline, adapter = inpaint
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--steps", 2, "--device", "cpu"]
    return [str(w) for w in ["evaluate", manifest, "--pipeline", pipeline, "--out", out, *options, *more]]


def results(out):
    """{id: row} of results.csv, in which no id is twice."""
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def scores_of(out):
    return {i: [row[name] for name in ("status", *SCORES, "seed")] for i, row in results(out).items()}


# --------------------------------------------------------------------------------------------------------- end to end


def test_everything_is_scored_and_failures_are_recorded(inpaint, dataset, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(arguments(inpaint, dataset, out, "--save-images", "--save-maps", "--size", "64x72")) == SOME_FAILED
    table = results(out)
    assert list(table) == list("abcdef")
    assert [i for i in table if table[i]["status"] == "ok"] == list("abcf")
    assert "broken.png" in table["d"]["error"]
    assert "no file" in table["e"]["error"]
    assert table["b"]["seed"] == "7"
    assert table["a"]["seed"] == str(derived_seed(0, "a"))

    for name in "acf":  # the scores are those of the maps that were saved
        maps = i2am.AttributionMaps.load(out / "maps" / f"{name}.safetensors")
        generated = Image.open(out / "images" / f"{name}.png")
        mask = np.asarray(Image.open(images / "mask.png").resize((72, 64), Image.NEAREST)) / 255.0
        reference_mask = np.zeros((40, 40))
        reference_mask[:, :20] = 1  # columns 10…30 of the 60, cut to the central 40
        want = score(maps.ulam("r2g")[0], maps.ulam("g2r")[0], mask, reference_mask)
        assert generated.size == (72, 64)
        assert float(table[name]["imacs_r2g"]) == pytest.approx(want["imacs_r2g"], abs=1e-6)
        assert float(table[name]["imacs_g2r"]) == pytest.approx(want["imacs_g2r"], abs=1e-6)
        if name != "c":  # it has a box of its own
            assert float(table[name]["box_iou"]) == pytest.approx(want["box_iou"])
        small, layers = read_levels(out / "levels" / f"{name}.safetensors")
        assert layers == maps.layers
        want = maps.tlam("g2r")[0] / maps.tlam("g2r")[0].mean((1, 2), keepdim=True)
        torch.testing.assert_close(small["g2r.tlam"], want, rtol=2e-3, atol=1e-3, equal_nan=True)

    summary = json.loads((out / "summary.json").read_text())
    assert (summary["ok"], summary["failed"], summary["missing"]) == (4, 2, 0)
    for name in (*SCORES, "seconds"):
        assert summary["scores"][name] == pytest.approx(interval([float(table[i][name]) for i in "abcf"])), name
    assert np.asarray(Image.open(out / "contact.png").convert("RGB")).std() > 10
    printed = capsys.readouterr()
    assert "4 of 6 samples, 2 failed" in printed.out
    assert "sample/s" in printed.err or "s/sample" in printed.err  # rate and remaining time

    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    assert [r["id"] for r in rows] == list("abcdef")
    assert rows[0]["imacs_r2g"] == float(table["a"]["imacs_r2g"])
    assert rows[3]["imacs_r2g"] is None


def test_resumes_without_doing_anything_twice(inpaint, dataset, images, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert cli.main(arguments(inpaint, dataset, whole)) == SOME_FAILED
    done = []
    original = command._traced

    def counted(job, sample):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(sample.id)
        return original(job, sample)

    monkeypatch.setattr(command, "_traced", counted)
    assert cli.main(arguments(inpaint, dataset, out)) == STOPPED
    assert done == ["a", "b"]
    assert not (out / "results.csv").exists()
    killed = ".".join((".i2am-" + machine(), "4194304", "1", "0123456789ab", "part"))  # a pid that none has
    (out / "previews" / killed).write_text("half")
    foreign = out / "previews" / killed.replace(machine(), "elsewhere-01234567")
    foreign.write_text("of a machine that may still write it")

    monkeypatch.setattr(command, "_traced", lambda job, s: done.append(s.id) or original(job, s))
    assert cli.main(arguments(inpaint, dataset, out)) == SOME_FAILED
    assert done == list("abcdef")
    assert [p.name for p in out.glob("*/.*.part")] == [foreign.name]
    assert [p.name for p in (out / "running").iterdir()] == []
    assert scores_of(out) == scores_of(whole)
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    assert [one.pop(name) for name in ("samples", "ok", "failed", "missing")] == [6, 4, 2, 0]
    assert all(one["scores"][name] == other["scores"][name] for name in SCORES)

    done.clear()  # those that failed are tried again, and only they
    assert cli.main(arguments(inpaint, dataset, out)) == SOME_FAILED
    assert done == ["d", "e"]
    done.clear()
    dataset.write_text(dataset.read_text().replace("nowhere.png", "reference.png").replace("broken.png", "image.png"))
    assert cli.main(arguments(inpaint, dataset, out)) == 0
    assert done == ["d", "e"]
    assert results(out)["d"]["status"] == "ok"
    done.clear()  # a row that changed is done again
    dataset.write_text(dataset.read_text().replace("a cup", "a dog"))
    assert cli.main(arguments(inpaint, dataset, out)) == 0
    assert done == ["a"]


def test_any_split_gives_the_same(inpaint, dataset, tmp_path, monkeypatch):
    """Three processes that have found what is left before any has begun: each sample is done once, by one of them."""
    one, split, done = tmp_path / "one", tmp_path / "split", []
    assert cli.main(arguments(inpaint, dataset, one)) == SOME_FAILED
    original = command._traced

    def traced(job, sample):
        done.append((len(started), sample.id))
        if started[-1:] == [0] and len(done) == 2:  # in the middle of the first one's share: the two others come and go
            for rank in (1, 2):
                started.append(rank)
                with monkeypatch.context() as patch:
                    patch.setattr(Process, "of_environment", lambda rank=rank: Process(rank, 3))
                    assert cli.main(arguments(inpaint, dataset, split)) == STOPPED  # b is left, with no other process
        return original(job, sample)

    started = [0]
    monkeypatch.setattr(command, "_traced", traced)
    assert cli.main(arguments(inpaint, dataset, split)) == SOME_FAILED
    assert [name for _, name in done[:6]] == list("abcfde")  # the second one's share first, then what others have left
    assert sorted(name for _, name in done if name in "abcf") == list("abcf")  # those that fail are tried by each
    assert scores_of(split) == scores_of(one)


def test_other_settings_need_another_folder(inpaint, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    cli.main(arguments(inpaint, dataset, out))
    before = (out / "results.csv").read_text()
    assert cli.main(arguments(inpaint, dataset, out, "--guidance-scale", 2)) == 2
    assert "guidance_scale" in capsys.readouterr().err
    assert (out / "results.csv").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    assert cli.main(arguments(inpaint, dataset, tmp_path / "mine")) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["record", "levels", "summary"])
def test_a_full_disk_stops_cleanly(inpaint, dataset, tmp_path, capsys, monkeypatch, where):
    """Every writer meets it once; what was finished stays, and the next run goes on."""
    out, real, appended, countdown = tmp_path / "out", Store.write, Writer.append, iter(range(100))
    after = 0 if where == "summary" else 2

    def write(self, path, how):
        folder = {"levels": "levels", "summary": "out"}.get(where)
        if path.parent.name == folder and next(countdown) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path, how)

    def append(self, record):
        if where == "record" and next(countdown) == after:
            os.write(self._handle, b'{"id": "half')  # what fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        appended(self, record)

    monkeypatch.setattr(Store, "write", write)
    monkeypatch.setattr(Writer, "append", append)
    assert cli.main(arguments(inpaint, dataset, out)) == STOPPED
    err = capsys.readouterr().err
    assert "no room left" in err
    assert f"{4 if where == 'summary' else 2} of 6" in err
    monkeypatch.setattr(Store, "write", real)
    monkeypatch.setattr(Writer, "append", appended)
    assert cli.main(arguments(inpaint, dataset, out)) == SOME_FAILED
    assert [r["status"] for r in results(out).values()] == ["ok"] * 3 + ["failed"] * 2 + ["ok"]


FULL_DISK = """
set -e
mount -t tmpfs -o size=$3 none $1
code=0; "${@:4}" || code=$?
mkdir -p $2/samples; cp $1/out/samples/*.jsonl $2/samples/ 2>/dev/null || true
mount -o remount,size=50M $1
again=0; "${@:4}" || again=$?
cp -r $1/out $2/whole; echo "codes $code $again"
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", ["24k", "96k"])
def test_a_disk_that_is_really_full(inpaint, dataset, tmp_path, room):
    """A small file system in a namespace of its own, which grows after the first run."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    disk, kept, whole = tmp_path / "disk", tmp_path / "kept", tmp_path / "whole"
    disk.mkdir()
    kept.mkdir()
    job = [sys.executable, "-m", "i2am", *arguments(inpaint, dataset, disk / "out", "--save-images")]
    shell = [*namespace, "bash", "-c", FULL_DISK, "bash", disk, kept, room, *job]
    result = subprocess.run(list(map(str, shell)), capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == f"codes {STOPPED} {SOME_FAILED}", result.stderr
    assert "no room left for results in" in result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for p in (kept / "samples").glob("*.jsonl") for line in p.read_text().splitlines()[1:]]
    before = {r["id"]: r for r in map(json.loads, lines)}  # whole, all of them
    assert f"{sum(r['status'] == 'ok' for r in before.values())} of 6 samples are finished" in result.stderr
    assert cli.main(arguments(inpaint, dataset, whole, "--save-images")) == SOME_FAILED
    assert scores_of(kept / "whole") == scores_of(whole)
    seconds = {name: row["seconds"] for name, row in results(kept / "whole").items()}
    assert all(float(seconds[i]) == r["seconds"] for i, r in before.items() if r["status"] == "ok")  # not done again


def test_safetensors_says_that_the_disk_is_full():
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(run_module.DiskFull):
        run_module.stop_if_full(error, Store("out"))
    run_module.stop_if_full(ValueError("other"), Store("out"))


@pytest.mark.slow
def test_two_processes_agree_with_one(inpaint, dataset, tmp_path):
    """accelerate splits the samples over two CPU processes: each is done once, with the very same scores."""
    pytest.importorskip("accelerate")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, "-m", "i2am", *arguments(inpaint, dataset, one)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "i2am"]
    launch += arguments(inpaint, dataset, two)
    assert subprocess.run(alone, env=environment, capture_output=True).returncode == SOME_FAILED
    result = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert result.returncode != 0, result.stderr  # two samples fail
    assert len(list((two / "samples").glob("*.jsonl"))) == 2  # with --cpu, accelerate starts one process
    assert scores_of(one) == scores_of(two)
    assert json.loads((two / "summary.json").read_text())["ok"] == 4, result.stderr


def records_in(out):
    """Whole lines of all journals, their headers left out."""
    return sum(max(p.read_bytes().count(b"\n") - 1, 0) for p in out.glob("samples/*.jsonl"))


@pytest.mark.slow
def test_killed_at_any_point(inpaint, dataset, tmp_path):
    """SIGKILL again and again: in the end every sample counts once, with the scores of an undisturbed run."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    cli.main(arguments(inpaint, dataset, whole))
    code = [sys.executable, "-m", "i2am", *arguments(inpaint, dataset, out)]
    for pause in (0.0, 0.05, 0.1, 0.02):
        process = subprocess.Popen(code, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        seen = records_in(out)
        while process.poll() is None and records_in(out) <= seen:
            time.sleep(0.01)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(code, capture_output=True).returncode == SOME_FAILED
    assert scores_of(out) == scores_of(whole)


# ----------------------------------------------------------------------------------------------------- wrong input


def test_what_the_pipeline_needs_is_checked_before_loading(inpaint, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Job, "load", lambda self: pytest.fail("weights were loaded"))
    manifest = tmp_path / "m.csv"
    manifest.write_text("reference,image\nr.png,i.png\n")
    assert cli.main(arguments(inpaint, manifest, tmp_path / "out")) == 2
    assert "--mask" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.txt", "reference\nr.png\n", [".csv", ".jsonl"]),
        ("m.csv", "reference\n", ["no samples"]),
        ("m.csv", "referense\nr.png\n", ["line 2", "referense", "reference_mask"]),
        ("m.csv", "id,reference\na,r.png\na,s.png\n", ["line 3", "'a'", "line 2"]),
        ("m.csv", "id,reference\n../a,r.png\n", ["line 2", "../a"]),
        ("m.csv", "id,reference\na\n", ["line 2", "cells"]),
        ("m.csv", "reference,seed\nr.png,x\n", ["seed 'x'"]),
        ("m.csv", "reference,box\nr.png,1 2 3\n", ["box '1 2 3'", "top left bottom right"]),
        ("m.csv", "reference,box\nr.png,5 2 3 9\n", ["empty"]),
        ("m.jsonl", '{"reference": "r.png"}\n{"reference"\n', ["line 2", "not JSON"]),
        ("m.jsonl", "[1]\n", ["line 1", "object"]),
        ("m.jsonl", '{"reference": 3}\n', ["line 1", "reference is 3"]),
    ],
)
def test_manifests_that_are_none(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read_manifest(tmp_path / name)
    for word in (name, *words):
        assert word in str(error.value)


# ------------------------------------------------------------------------------------------------- single decisions


def test_both_forms_of_manifest(tmp_path):
    (tmp_path / "m.csv").write_text('\ufeffid,reference,prompt,seed,box\na,sub/r.png,"a, b",3,1 2 30 40\n,r.png,,,\n')
    rows = ['{"id": "a", "reference": "sub/r.png", "prompt": "a, b", "seed": 3, "box": [1, 2, 30, 40]}']
    (tmp_path / "m.jsonl").write_text("\n".join([*rows, "", '{"reference": "r.png"}']))
    for name in ("m.csv", "m.jsonl"):
        first, second = read_manifest(tmp_path / name, seed=5)
        assert (first.id, first.seed, first.texts, first.box) == ("a", 3, {"prompt": "a, b"}, i2am.Box(1, 2, 30, 40))
        assert first.files == {"reference": tmp_path / "sub" / "r.png"}
        assert (second.id, second.seed) == ("row-00002", derived_seed(5, "row-00002"))


def test_cells_of_several_lines(tmp_path):
    """A quoted cell holds lines; a JSON text holds separators that other formats end lines at."""
    (tmp_path / "m.csv").write_text('reference,prompt\nr.png,"a\nb"\ns.png,c\n')
    assert [s.texts["prompt"] for s in read_manifest(tmp_path / "m.csv")] == ["a\nb", "c"]
    (tmp_path / "m.jsonl").write_text('{"reference": "r.png", "prompt": "a\u2028b"}\n{"reference": "s.png"}\n')
    assert [s.texts.get("prompt") for s in read_manifest(tmp_path / "m.jsonl")] == ["a\u2028b", None]


def test_what_a_killed_run_leaves(tmp_path):
    """Killed while its settings were written, it left nothing to go on with; a record cut short counts as none."""
    out, sample = tmp_path / "out", Sample("a", 0, digest="x")
    out.mkdir()
    (out / f".i2am-{machine()}.4194304.1.0123456789ab.part").write_text('{"comm')
    store = Store(out)
    store.open({"command": "evaluate"})
    assert not list(out.glob(".*.part"))
    store.finish({"id": "a", "digest": "x"})
    assert store.record(sample) is not None
    (journal,) = (out / "samples").glob("*.jsonl")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    again = Store(out)
    again.open({"command": "evaluate"})
    assert again.record(sample) is None
    again.finish({"id": "b", "digest": "x"})
    assert Store(out).record(Sample("b", 0, digest="x")) is not None
    assert Store(out).record(sample) is None
    journal.write_bytes(whole[:-2] + b"\x00\xff\n")  # a disk that lost power
    assert Store(out).record(sample) is None


def test_seeds_depend_on_nothing_but_seed_and_id():
    assert derived_seed(0, "a") == derived_seed(0, "a")
    assert len({derived_seed(s, i) for s in range(3) for i in "abc"}) == 9


def test_interval_covers_the_mean():
    """In 95 of 100 runs, about: 200 experiments of 40 normal values."""
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(3, 1, 40)) for _ in range(200)]
    covered = np.mean([f["low"] <= 3 <= f["high"] for f in found])
    assert 0.89 < covered < 0.99
    few = interval([0.0] * 40 + [1.0] * 10)  # the mean's, whatever the values' shape
    for end, side in (("low", -1), ("high", 1)):
        assert few[end] == pytest.approx(0.2 + side * 1.96 * 0.4 / 50**0.5, abs=0.03)
    assert interval([1.0]) == {"n": 1, "mean": 1.0, "sd": None, "low": None, "high": None}


def test_box_of_a_mask():
    mask = torch.zeros(6, 8)
    mask[2:4, 3:7] = 1
    mask[5, 0] = 0.4
    assert box_of(mask) == i2am.Box(2, 3, 4, 7)
    with pytest.raises(ValueError, match="empty"):
        box_of(torch.zeros(3, 3))


def test_boxes_are_compared_in_the_masks_pixels_and_a_given_one_counts():
    r2g, mask = torch.zeros(32, 32), torch.zeros(128, 128)
    r2g[8:16, 4:20] = 1
    mask[32:64, 16:80] = 1
    assert score(r2g, None, mask)["box_iou"] > 0.85
    assert score(r2g, None, mask, box=i2am.Box(100, 100, 120, 120))["box_iou"] == 0
    assert score(r2g, None, 1 - mask, box=i2am.Box(32, 16, 64, 80))["box_iou"] > 0.85


def test_nothing_found_counts_zero():
    assert score(torch.ones(8, 8), None, box=i2am.Box(0, 0, 4, 4)) == {"box_iou": 0.0}


def test_contact_sheet_shows_best_and_worst(tmp_path, monkeypatch):
    store, samples = Store(tmp_path), [Sample(f"s{i:02d}", 0, digest="x") for i in range(14)]
    colours = {s.id: (80 + 12 * i, 250 - 15 * i, 40 + 90 * (i % 3)) for i, s in enumerate(samples)}
    store.open({"command": "evaluate"})
    for i, s in enumerate(samples):
        strip = Image.new("RGB", (90, 20), colours[s.id])
        store.write(store.path("previews", s.id, ".jpg"), lambda p, strip=strip: strip.save(p, "jpeg", quality=95))
        scores = {"imacs_r2g": -(5 * i % 14) / 10, "box_iou": i / 14}  # best first: 0, 3, 6, …
        store.finish({"id": s.id, "digest": "x", "status": "ok", "seed": 0, "seconds": float(i), **scores})
    from i2am.evaluate import summary as module

    drawn = []
    original = module.contact_sheet
    monkeypatch.setattr(module, "contact_sheet", lambda *args: drawn.append(args) or original(*args))
    summarise(samples, store)
    ((rows, count, by),) = drawn
    order = [3 * i % 14 for i in range(14)]
    assert [row[:2] for row in rows[:5]] == [("best", f"s{i:02d}") for i in order[:5]]
    assert [row[:2] for row in rows[5:]] == [("worst", f"s{i:02d}") for i in order[9:]]
    assert (count, by) == (14, "imacs_r2g")
    assert rows[9].scores == "IMACS of R2G −1.300   Box IoU 0.786"
    sheet = np.asarray(Image.open(tmp_path / "contact.png").convert("RGB")).astype(int)
    last = 0
    for row in rows:  # each strip once, from top to bottom, under letters
        colour = np.abs(sheet - np.array(colours[row.name])).max(2) < 12
        (top, bottom), (left, right) = np.flatnonzero(colour.any(1))[[0, -1]], np.flatnonzero(colour.any(0))[[0, -1]]
        assert (bottom - top + 1, right - left + 1) == (20, 90)
        assert (sheet[max(last, top - 18) : top - 2] < 100).any()
        assert top > last + 15
        last = bottom
