"""`i2am evaluate` itself, of a trained model, by four processes: on two pretended machines, in a SLURM array; kills."""

import collections
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image

from i2am import cli, zoo
from i2am.evaluate import Store, read_manifest
from i2am.zoo.pipelines import as_images

COUNT = 56


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """(folder of a saved zoo pipeline, manifest of its held-out task, 56 samples)."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo.load("exemplar").save_pretrained(folder / "pipeline")
    return folder / "pipeline", write_task(folder, COUNT)


def write_task(folder, count):
    try:
        task = zoo.samples("exemplar", count)
    except zoo.MissingPhotographs as error:
        pytest.skip(str(error))
    masks = as_images(task.mask.expand(-1, 3, -1, -1) * 2 - 1)
    rows = ["id,reference,image,mask"]
    for i, pictures in enumerate(zip(as_images(task.reference), as_images(task.scene), masks, strict=True)):
        for name, picture in zip(("reference", "image", "mask"), pictures, strict=True):
            picture.save(folder / f"{i:03d}-{name}.png")
        rows.append(f"s{i:03d},{i:03d}-reference.png,{i:03d}-image.png,{i:03d}-mask.png")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


def words(dataset, out):
    pipeline, manifest = dataset
    return ["evaluate", manifest, "--pipeline", pipeline, "--steps", 1, "--device", "cpu", "--out", out]


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def started(command, log, **more):
    with open(log, "wb") as file:
        return subprocess.Popen([*map(str, command)], env=environment(**more), stdout=file, stderr=file)


def finished(out):
    """How many samples have a record."""
    return sum(max(p.read_bytes().count(b"\n") - 1, 0) for p in out.glob("samples/*.jsonl"))


def wait_for(condition, limit=1500):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "nothing happens any more"
        time.sleep(0.05)


def check_whole(dataset, out):
    """Each sample once, in the journals and in the one table; nothing half-written; nobody signed in."""
    samples = read_manifest(dataset[1])
    lines = [json.loads(x) for p in out.glob("samples/*.jsonl") for x in p.read_text().splitlines()]
    written = collections.Counter(line["id"] for line in lines if line.get("status") == "ok")
    assert written == dict.fromkeys((s.id for s in samples), 1)
    with open(out / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [s.id for s in samples]
    assert {row["status"] for row in table} == {"ok"}
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["ok"], summary["failed"], summary["missing"]) == (COUNT, 0, 0)
    assert summary["scores"]["imacs_r2g"]["n"] == COUNT
    assert [r["id"] for r in Store(out).records(samples)] == [s.id for s in samples]
    for sample in samples:
        Image.open(out / "previews" / f"{sample.id}.jpg").load()
    assert list((out / "running").iterdir()) == []
    assert not list(out.glob("**/.i2am-*"))
    return {row["id"]: row["imacs_r2g"] for row in table}


def test_a_saved_model_of_the_zoo_is_a_pipeline(tmp_path, capsys):
    """The command reads what `zoo.load(...).save_pretrained` has written, and finds its reference."""
    zoo.load("exemplar").save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "out"
    dataset = tmp_path / "pipeline", write_task(tmp_path, 2)
    assert cli.main([*map(str, words(dataset, out))]) == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ok"] == 2
    assert summary["scores"]["box_iou"]["mean"] > 0.3  # it is the trained one, and its mask is the one that scores


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0])
def test_accelerate_on_two_machines(dataset, tmp_path, seed):
    """Two launchers of two processes each, as on two machines; one process is killed, and both are started again."""
    pytest.importorskip("accelerate")
    dice, out = random.Random(seed), tmp_path / "out"

    def launch(go):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        options = ["--multi_gpu", "--num_processes", 4, "--num_machines", 2, "--main_process_ip", "127.0.0.1"]
        options += ["--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no"]
        code = [sys.executable, "-m", "accelerate.commands.launch", *options]
        logs = [tmp_path / f"machine-{go}-{rank}.log" for rank in range(2)]
        return [
            started([*code, "--machine_rank", rank, "-m", "i2am", *words(dataset, out)], log)
            for rank, log in enumerate(logs)
        ], logs

    launchers, logs = launch(1)
    try:
        wait_for(lambda: len(list(out.glob("samples/*.jsonl"))) == 4 or any(p.poll() is not None for p in launchers))
        workers = [p for launcher in launchers for p in psutil.Process(launcher.pid).children()]
        assert len(workers) == 4, [log.read_text()[-2000:] for log in logs]
        wait_for(lambda: finished(out) > 6 + dice.randrange(6))
        dice.choice(workers).send_signal(signal.SIGKILL)
        wait_for(lambda: any(launcher.poll() is not None for launcher in launchers))
    finally:
        for launcher in launchers:  # as a scheduler ends a job whose machine has gone
            if launcher.poll() is None:
                launcher.terminate()
        for launcher in launchers:
            launcher.wait()
    assert 0 < finished(out) < COUNT
    launchers, logs = launch(2)
    codes = [launcher.wait() for launcher in launchers]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    check_whole(dataset, out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0])
def test_a_slurm_array(dataset, tmp_path, seed):
    """Four tasks; two are killed, one of which SLURM starts again. The others do the rest, the last one sums up."""
    dice, out = random.Random(seed), tmp_path / "out"

    def task(number, go=1):
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}
        command = [sys.executable, "-m", "i2am", *words(dataset, out)]
        return started(command, tmp_path / f"task-{number}-{go}.log", SLURM_NTASKS="1", SLURM_PROCID="0", **array)

    tasks = [task(number) for number in range(4)]
    try:
        wait_for(lambda: len(list(out.glob("samples/*.jsonl"))) == 4)
        first, second = dice.sample(range(4), 2)
        for victim in (first, second):
            seen = finished(out)
            wait_for(lambda seen=seen: finished(out) > seen + dice.randrange(3))
            tasks[victim].kill()
            tasks[victim].wait()
        tasks[first] = task(first, 2)
        codes = [process.wait() for process in tasks]
    finally:
        for process in tasks:
            process.kill()
    del codes[second]
    logs = {log.name: log.read_text()[-1500:] for log in tmp_path.glob("*.log")}
    assert codes == [0, 0, 0], logs
    assert any(f"{COUNT} of {COUNT} samples" in text for text in logs.values()), logs
    check_whole(dataset, out)
    seeds = {s.id: s.seed for s in read_manifest(dataset[1])}
    assert {r["id"]: r["seed"] for r in Store(out).records(read_manifest(dataset[1]))} == seeds


def test_the_last_one_sums_up_what_others_finish_meanwhile(dataset, tmp_path, monkeypatch):
    """While this one writes its table another finishes the last sample, and has written the whole table before."""
    from i2am import evaluate as module

    pipeline, manifest = dataset
    few = manifest.with_name("few.csv")
    few.write_text("\n".join(manifest.read_text().splitlines()[:4]) + "\n")
    out, original, counts = tmp_path / "out", module.summarise, []

    def summarise(samples, store):
        found = original(samples, store)
        counts.append(found["ok"])
        if len(counts) == 1:  # the record that another process has appended since this one has read them
            path = next(out.glob("samples/*.jsonl"))
            lines = path.read_text().splitlines()
            extra = json.loads(lines[-1]) | {"id": "later"}
            path.with_name("other.jsonl").write_text(lines[0] + "\n" + json.dumps(extra) + "\n")
        return found

    monkeypatch.setattr(module, "summarise", summarise)
    assert cli.main([*map(str, words((pipeline, few), out))]) == 0
    assert counts == [3, 3]
