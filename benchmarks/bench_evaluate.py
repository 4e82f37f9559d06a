"""What a folder of many results costs ``i2am evaluate``: to go on, per sample, and for the tables. CPU only.

Goal for 100,000 rows: at most 5 s to go on and 300 MB in all (PyTorch's 230 MB with them), tables included, and as much
for a sample as in an empty folder. ``pytest benchmarks/bench_evaluate.py -s -o python_files='bench_*.py'`` prints both.
What a pipeline takes comes on top: diffusers and its models' classes alone are about 300 MB and 7 s.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from i2am.evaluate import Store, read_manifest
from i2am.evaluate.identity import pictures_identity

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"command": "evaluate", "versions": {"torch": "2"}}
PICTURES = 1000

GO_ON = """
import json, resource, sys, time
from pathlib import Path
import psutil, torch
from i2am.evaluate import Sample, Store, read_manifest, summarise

def megabytes():
    return psutil.Process().memory_info().rss / 1e6

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
found, imported, start, cpu = {}, megabytes(), time.perf_counter(), time.process_time()
samples, store = read_manifest(folder / "m.csv"), Store(folder / "out")
store.open(settings)
assert store.pending(samples) == []
found["seconds"], found["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
found["mb"], found["mb_of_imports"] = megabytes(), imported
start = time.perf_counter()
for i in range(50):
    sample = Sample(f"new-{i}", 0)
    assert store.claim(sample)
    store.finish({"id": sample.id, "digest": "", "status": "failed", "error": "", "seed": 0})
    store.release(sample)
found["ms_a_sample"] = (time.perf_counter() - start) / 50 * 1e3
start = time.perf_counter()
assert summarise(samples, store)["ok"] == len(samples)
found["summary_seconds"] = time.perf_counter() - start
found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3
store.close()
print(json.dumps(found))
"""


def fill(folder, rows):
    """Write a manifest of ``rows`` samples, three pictures each, and a folder in which all of them are done."""
    (folder / "p").mkdir(parents=True)
    for i in range(PICTURES):
        (folder / "p" / f"{i}.png").write_bytes(b"x" * 1000)
    with open(folder / "m.csv", "w", encoding="utf-8") as file:
        file.write("id,reference,image,mask,prompt\n")
        for i in range(rows):
            pictures = ",".join(f"p/{(i + j) % PICTURES}.png" for j in range(3))
            file.write(f"sample-{i:06d},{pictures},a photograph of a person who wears number {i}\n")
    samples, store = read_manifest(folder / "m.csv"), Store(folder / "out")
    store.open(SETTINGS)
    scores = {"status": "ok", "imacs_r2g": 0.5, "imacs_g2r": 0.25, "box_iou": 0.75, "seconds": 1.5}
    store.finish(
        {"id": "first", "digest": ""}
    )  # makes the file; the others go in at once, without waiting for the disk
    store.close()
    (journal,) = (folder / "out" / "samples").glob("*.jsonl")
    with open(journal, "a", encoding="utf-8") as file:
        for x in samples:
            pictures = pictures_identity(x)
            record = {"finished": 1.0, "pictures": pictures, **scores, "id": x.id, "seed": x.seed, "digest": x.digest}
            file.write(json.dumps(record) + "\n")
    (folder / "out" / "previews").mkdir()
    for x in [*samples[:5], *samples[-5:]]:  # of equal scores the sheet shows the first and the last
        Image.new("RGB", (780, 192), "grey").save(folder / "out" / "previews" / f"{x.id}.jpg")


@pytest.mark.parametrize("rows", [1, pytest.param(100_000, marks=pytest.mark.slow)])
def test_going_on(benchmark, capsys, tmp_path, rows):
    fill(tmp_path, rows)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GO_ON, str(tmp_path), json.dumps(SETTINGS)]

    def go_on():
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    found = benchmark.pedantic(go_on, rounds=1)
    benchmark.extra_info.update(rows=rows, **found)
    with capsys.disabled():
        print(f"\n{rows} rows: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
