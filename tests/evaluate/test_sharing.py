"""Several processes in one folder, what dead ones leave, and results of another experiment."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from i2am._files import machine, runs, this_process, write_atomically
from i2am.cli.processes import Process
from i2am.evaluate import Sample, Store, evaluate, read_manifest, summarise
from i2am.evaluate.identity import difference, pictures_identity, weights_identity
from i2am.evaluate.journal import Entry, Writer
from i2am.evaluate.leases import Lease
from i2am.evaluate.run import Traced
from i2am.maps import AttributionMaps, LayerSums

SETTINGS = {"command": "evaluate", "versions": {}}
PICTURE = np.random.default_rng(0).random((32, 32, 3))
PROC = Path("/proc/self/stat").exists()
MASK = np.pad(np.ones((12, 12), np.float32), 10)


def maps():
    sums = dict(grid=(8, 8), reference_grid=(4, 4), skip=0, keys=16, default=True, counts=(1,))
    return AttributionMaps(
        [LayerSums(layer="a", reference="r", **sums, r2g=torch.rand(1, 1, 2, 64), g2r=torch.rand(1, 1, 2, 16))]
    )


def samples_of(count):
    return [Sample(f"s{i:03d}", i, digest=f"d{i}") for i in range(count)]


def work(folder, count):
    """What one process does, its start and end told by files."""
    torch.set_num_threads(1)
    store, samples = Store(Path(folder) / "out"), samples_of(count)
    store.open(SETTINGS)
    left = [samples[place] for place in store.pending(samples)]
    evaluate(left, lambda sample: Traced(maps(), PICTURE, PICTURE, MASK), store)
    store.close()


def records_of(folder, count):
    """Every line of every journal, and what counts of them."""
    lines = [json.loads(x) for p in (folder / "out" / "samples").glob("*.jsonl") for x in p.read_text().splitlines()]
    return [x["id"] for x in lines if "id" in x], list(Store(folder / "out").records(samples_of(count)))


def killed_at_random(folder, count, processes, kills, seed):
    context, dice = multiprocessing.get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["i2am.evaluate.sheet", "i2am.maps", "scipy.ndimage", "tests.evaluate.test_sharing"])
    running = [context.Process(target=work, args=(str(folder), count)) for _ in range(processes)]
    for process in running:
        process.start()
    for _ in range(kills):
        time.sleep(dice.uniform(0.5, 3))
        victim = dice.choice([i for i, p in enumerate(running) if p.is_alive()] or [0])
        if running[victim].is_alive():
            os.kill(running[victim].pid, signal.SIGKILL)
        running[victim].join()
        running[victim] = context.Process(target=work, args=(str(folder), count))
        running[victim].start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    work(str(folder), count)  # whatever the last ones that were killed had begun
    written, kept = records_of(folder, count)
    assert [r["id"] for r in kept] == [s.id for s in samples_of(count)]
    assert all(r["status"] == "ok" for r in kept)
    assert len(written) == len(set(written))  # nothing was done twice
    for file in (folder / "out" / "previews").glob("*.jpg"):
        Image.open(file).load()
    assert not list((folder / "out").glob("*/.*.part"))


def test_two_processes_share_a_folder_and_one_is_killed(tmp_path):
    killed_at_random(tmp_path, 24, 2, 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_four_processes_killed_at_random(tmp_path, seed):
    killed_at_random(tmp_path, 200, 4, 8, seed)


# ------------------------------------------------------------------------------------------------------------- claims


def test_a_claim_is_one_process_until_it_is_given_back_or_dead(tmp_path):
    with Lease(tmp_path) as a, Lease(tmp_path) as b:
        assert a.claim("x")
        assert not b.claim("x")
        a.release("x")
        assert b.claim("x")
        assert a.claim("y")
        os.kill(os.getpid(), 0)
        a.path.unlink()  # as if it had died
        assert b.claim("y")
        assert not Lease(tmp_path).claim("y")
        b.release("y")
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("y")) == []


def test_a_claim_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    with Lease(tmp_path) as a, Lease(tmp_path) as b:
        assert a.claim("x")
        assert not b.claim("x")


def test_processes_are_told_apart_from_later_ones_of_their_number():
    host, pid, started = this_process()
    assert host == machine()
    assert runs(pid, started)
    assert not runs(pid, started + 1)  # the number was given again
    assert not runs(4194304, 0)


def test_a_lease_of_another_machine_lives_by_its_beat(tmp_path):
    with Lease(tmp_path) as lease:
        owner = lease.owner._replace(name="elsewhere-1-x.lease", machine="elsewhere-12345678", pid=1)
        other = tmp_path / owner.name
        other.write_text(json.dumps(owner._asdict()))
        assert [o.name for o in lease.others()] == [owner.name]
        long_ago = time.time() - 3600
        os.utime(other, (long_ago, long_ago))
        assert lease.others() == []
        assert other.exists()  # of another machine: not ours to remove


def test_a_lease_of_a_dead_process_of_this_machine_holds_nothing_however_fresh(tmp_path):
    """And one of a process that lives here holds, however old its last beat: it may have been stopped for an hour."""
    with Lease(tmp_path) as lease:
        dead = lease.owner._replace(name=f"{machine()}-4194304-x.lease", pid=4194304)
        (tmp_path / dead.name).write_text(json.dumps(dead._asdict()))
        assert not lease.alive(dead)
        assert lease.others() == []
        assert not (tmp_path / dead.name).exists()
        parent = os.getppid()
        started = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]) if PROC else 0
        here = lease.owner._replace(name=f"{machine()}-{parent}-x.lease", pid=parent, started=started)
        (tmp_path / here.name).write_text(json.dumps(here._asdict()))
        os.utime(tmp_path / here.name, (1, 1))
        assert lease.alive(here) or not PROC


# ----------------------------------------------------------------------------------------------------------- identity


def run(folder, samples, restart=False):
    """The samples that were done."""
    store, done = Store(folder), []
    store.open(SETTINGS)
    left = [samples[place] for place in store.pending(samples, restart=restart)]
    evaluate(left, lambda s: done.append(s.id) or Traced(maps(), PICTURE, PICTURE, MASK), store)
    store.close()
    return done


def test_a_picture_that_was_replaced(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "m.csv").write_text("id,reference\nx,a.png\ny,b.png\n")
    samples, out = read_manifest(tmp_path / "m.csv"), tmp_path / "out"
    assert run(out, samples) == ["x", "y"]
    assert run(out, samples) == []
    os.utime(tmp_path / "a.png")  # copied, or touched: the same picture
    assert run(out, samples) == []
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"other pictures \(y: reference .*b\.png has changed.*--restart"):
        run(out, samples)
    assert run(out, samples, restart=True) == ["y"]
    assert run(out, samples) == []


def test_a_record_without_news_is_not_read_again(tmp_path, monkeypatch):
    """Going on in a folder of many results reads each line once and keeps about 0.2 kB of it."""
    rows = 3000
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("reference,prompt\n" + "".join(f"a.png,number {i}\n" for i in range(rows)))
    samples, store = read_manifest(tmp_path / "m.csv"), Store(tmp_path / "out")
    store.open(SETTINGS)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    pictures = pictures_identity(samples[0])
    for s in samples:
        store.finish({"id": s.id, "digest": s.digest, "status": "ok", "pictures": pictures, "error": "x" * 500})
    store.close()
    again = Store(tmp_path / "out")
    again.open(SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr("i2am.evaluate.store.stale_picture", lambda *_: pytest.fail("read once more"))
        tracemalloc.start()
        assert again.pending(samples) == []
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert kept < 300 * rows
    assert len(list(again.records(samples))) == rows
    os.utime(tmp_path / "a.png", ns=(1, 1))  # the same picture, touched: looked into, and found to be the same
    assert again.pending(samples) == []
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="2999 samples more"):
        again.pending(samples)
    again.close()


def failed(sample):
    return {"id": sample.id, "digest": sample.digest, "seed": 0, "status": "failed", "error": "", "pictures": {}}


@pytest.mark.skipif(not PROC, reason="where processes are told from is Linux's")
def test_what_another_process_has_just_failed_is_not_tried_again(tmp_path, monkeypatch):
    """Not while it is there, as its launch does the rest; by the next run it is."""
    (sample,) = samples_of(1)
    one, other = Store(tmp_path), Store(tmp_path)
    other.open(SETTINGS)
    parent = os.getppid()  # stands for the process whose store the first is
    started = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    monkeypatch.setattr("i2am.evaluate.leases.this_process", lambda: (machine(), parent, started))
    one.open(SETTINGS)
    one.finish(failed(sample))
    assert other.pending([sample]) == []
    one.close()
    assert other.pending([sample]) == [0]
    other.close()


def test_a_failure_is_tried_again_once(tmp_path):
    """By whichever process comes first; the others see that it has been."""
    (sample,) = samples_of(1)
    earlier = Store(tmp_path)
    earlier.open(SETTINGS)
    earlier.finish(failed(sample))
    earlier.close()
    one, other = Store(tmp_path), Store(tmp_path)
    for store in (one, other):
        store.open(SETTINGS)
        assert store.pending([sample]) == [0]
        store.start()
    assert one.claim(sample)
    one.finish(failed(sample) | {"status": "ok"})
    one.release(sample)
    assert not other.claim(sample)
    for store in (one, other):
        store.close()


def test_what_another_process_gives_back_unfinished_is_done_after_all(tmp_path):
    """And what it has done meanwhile is not waited for."""
    samples = samples_of(3)
    one, other = Store(tmp_path), Store(tmp_path)
    for store in (one, other):
        store.open(SETTINGS)
    one.start()
    assert one.claim(samples[0])
    assert one.claim(samples[2])
    done = []

    def traced(sample):
        done.append(sample.id)
        if sample is samples[1]:
            one.release(samples[0])
            one.finish(failed(samples[2]) | {"status": "ok"})
            one.release(samples[2])
        return Traced(maps(), PICTURE, PICTURE, MASK)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("i2am.evaluate.run.time.sleep", lambda _: pytest.fail("nobody is waited for"))
        evaluate(samples, traced, other, wait=False)
        assert done == ["s001", "s000"]
        evaluate(samples, traced, other, wait=True)
    assert done == ["s001", "s000"]
    for store in (one, other):
        store.close()


@pytest.mark.parametrize("written", [1, 40, -1])
def test_a_record_that_is_being_written_counts_once_it_is_whole(tmp_path, written):
    """Whoever looks in between sees none, and looks again."""
    (sample,) = samples_of(1)
    one, other = Store(tmp_path), Store(tmp_path)
    for store in (one, other):
        store.open(SETTINGS)
    one.finish(failed(sample) | {"status": "ok"})
    one.close()
    (journal,) = (tmp_path / "samples").glob("*.jsonl")
    header, record = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(header + record[:written])
    assert other.pending([sample]) == [0]
    assert other.record(sample) is None
    journal.write_bytes(header + record)
    assert other.pending([sample]) == []
    assert other.record(sample)["status"] == "ok"
    other.close()


def test_a_good_record_stays(tmp_path):
    """Of one row: whatever comes later. Of another row: the later one counts."""
    good, bad = (Entry("a.jsonl", 0, ok, "row", 1.0, 0) for ok in (True, False))
    assert bad.replaces(None)
    assert not bad._replace(finished=2.0).replaces(good)
    assert good._replace(finished=0.5).replaces(bad)
    assert bad._replace(finished=2.0).replaces(bad)
    assert not bad._replace(finished=0.5).replaces(bad)
    assert bad._replace(digest="edited", finished=2.0).replaces(good)
    assert not good._replace(digest="edited", finished=0.5).replaces(bad)


def test_one_picture_that_is_gone_hides_no_change_of_another(tmp_path):
    picture = tmp_path / "image.png"
    picture.write_bytes(b"one")
    sample = Sample("a", 0, files={"reference": tmp_path / "gone.png", "image": picture}, digest="d")
    store = Store(tmp_path / "out")
    store.open(SETTINGS)
    store.finish(failed(sample) | {"status": "ok", "pictures": pictures_identity(sample)})
    assert store.pending([sample]) == []
    for contents in (b"another", b"two"):  # of the same size, too
        picture.write_bytes(contents)
        os.utime(picture, ns=(1, 1))
        with pytest.raises(ValueError, match=r"other pictures \(a: image"):
            store.pending([sample])
    store.close()


def test_weights_are_told_apart_by_their_files(tmp_path):
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet" / "w.safetensors"
    weights.write_bytes(b"a" * (2 << 20))
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "README.md").write_text("not weights")
    before = weights_identity(tmp_path)
    assert set(before) == {"unet/w.safetensors", "model_index.json"}
    os.utime(tmp_path / "model_index.json", (1, 1))  # small: its contents count
    assert weights_identity(tmp_path) == before
    os.utime(weights, (1, 1))
    now = weights_identity(tmp_path)
    found = difference({"weights": {"pipeline": before}}, {"weights": {"pipeline": now}})
    assert found == "weights of the pipeline: unet/w.safetensors has changed since"
    assert difference({"weights": {}, "steps": 3}, {"weights": {}, "steps": 4}) == "steps: 3, now 4"
    assert difference({"versions": 1}, {"versions": 2}, ["versions"]) is None


def test_links_among_weights(tmp_path):
    """Shared folders count under both names; a link back up ends; a link to nowhere is a value, not an error."""
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "w.safetensors").write_bytes(b"w")
    (tmp_path / "encoder" / "chat_template.jinja").write_text("{{ prompt }}")
    before = weights_identity(tmp_path)
    assert set(before) == {"encoder/w.safetensors", "encoder/chat_template.jinja"}
    for name, target in (("here", "."), ("encoder/up", ".."), ("gone.bin", "nowhere"), ("encoder_2", "encoder")):
        (tmp_path / name).symlink_to(target)
    now = weights_identity(tmp_path)
    twice = {f"encoder_2/{name.rpartition('/')[2]}": what for name, what in before.items()}
    assert now == before | twice | {"gone.bin": [0, "unreadable"]}


def test_other_settings_are_refused_or_done_anew(tmp_path):
    samples = samples_of(2)
    assert run(tmp_path / "out", samples) == ["s000", "s001"]
    store = Store(tmp_path / "out")
    with pytest.raises(ValueError, match="dtype: None, now 'float16'"):
        store.open(SETTINGS | {"dtype": "float16"})
    store.open(SETTINGS | {"dtype": "float16"}, restart=True)
    assert store.pending(samples) == [0, 1]
    assert list(store.records(samples)) == []


def test_a_folder_of_the_first_version_is_left_as_it_is(tmp_path):
    """It had a file a sample, and other settings."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "a.json").write_text('{"id": "a", "status": "ok"}')
    (tmp_path / "i2am.json").write_text('{"command": "evaluate", "steps": 3}')
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"results of i2am 0\.1.*name a new folder, or restart"):
        store.open(SETTINGS)
    assert (tmp_path / "samples" / "a.json").exists()
    store.open(SETTINGS, restart=True)
    assert not (tmp_path / "samples" / "a.json").exists()
    store.close()


def test_versions_are_kept_for_each_row(tmp_path):
    samples = samples_of(2)
    for version, sample in zip("12", samples, strict=True):
        store = Store(tmp_path / "out")
        store.open(SETTINGS | {"versions": {"torch": version}})
        store.finish({"id": sample.id, "digest": sample.digest, "status": "failed", "error": "\udcff", "seed": 0})
        store.close()
    summary = summarise(samples, store)
    assert summary["versions"] == {"torch 1": 1, "torch 2": 1}
    assert "\\udcff" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")


def test_an_error_that_cannot_be_shown_does_not_stop_the_others(tmp_path):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError

    def traced(sample):
        if sample.id == "s001":
            raise SystemExit(7)
        raise Odd

    store = Store(tmp_path / "out")
    store.open(SETTINGS)
    evaluate(samples_of(2), traced, store)
    assert [r["error"].split(":")[0] for r in store.records(samples_of(2))] == ["Odd", "SystemExit"]


# --------------------------------------------------------------------------------------------------------------- files


def test_writers_of_one_file_leave_one_of_them_whole(tmp_path):
    path, seen = tmp_path / "f", []

    def outer(file):
        file.write_text("outer")
        write_atomically(path, lambda inner: inner.write_text("inner"))
        seen.append(path.read_text())

    write_atomically(path, outer)
    assert (seen, path.read_text()) == (["inner"], "outer")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, lambda file: (file.write_text("half"), signal.raise_signal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert path.read_text() == "outer"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, "", True)),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, (1, 4, "h:1/1", False)),
        ({"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10"}, (2, 4, "", True)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, "", True)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1"}, (2, 3, "", True)),
        (  # --array=1-7:2, the third task of it, each of two processes
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
            },
            (5, 8, "", True),
        ),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, (0, 1, "", True)),  # one that is left
    ],
)
def test_who_this_process_is(monkeypatch, environment, expected):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = Process.of_environment()
    assert (process.index, process.count, process.name, process.speaks) == expected
    assert sorted(process.order(range(10))) == list(range(10))
    assert process.order(range(10))[0] == expected[0]


def test_a_record_that_did_not_fit_leaves_nothing(tmp_path, monkeypatch):
    """Not a byte, however much of it was written: what is appended next is a line of its own."""
    writer, write = Writer(tmp_path / "a.jsonl", {"identity": "x"}), os.write

    def full(handle, data):
        write(handle, data[:200])
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.append({"id": "a"})
    with monkeypatch.context() as disk, pytest.raises(OSError, match="No space"):
        disk.setattr(os, "write", full)
        writer.append({"id": "b", "error": "long" * 100})
    assert (tmp_path / "a.jsonl").read_bytes().endswith(b'"a"}\n')
    writer.append({"id": "c"})
    writer.close()
    assert [json.loads(line).get("id") for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [None, "a", "c"]
