"""The tables: what is written, from records that go by one by one."""

import csv
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from i2am.evaluate import Sample, Store, parquet, summarise
from i2am.evaluate import summary as module
from i2am.evaluate.contact import CAPTION, WIDEST, Row, _fitting, _font, contact_sheet
from i2am.evaluate.summary import MANY, interval

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"command": "evaluate", "versions": {"torch": "2"}, "device": "cpu"}


def store_of(folder, records):
    """A folder with these records, in this order, and its samples."""
    store = Store(folder)
    store.open(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        for record in records:
            store.finish({"digest": "x", "seed": 7, "seconds": 1.0, **record})
    samples = [Sample(record["id"], 7, digest="x") for record in records]
    return store, samples


def test_texts_with_lines_commas_and_no_value_come_back_from_both_tables(tmp_path):
    """A cell of several lines, quotes, a lone surrogate; numbers that are not there are empty, not 0."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    error = 'OSError: "a.png", line 1\nline 2, \N{SNOWMAN} \udcff'
    seed = 2**62 + 1  # a float64 would round it
    store, samples = store_of(
        tmp_path,
        [
            {"id": "bad", "status": "failed", "error": error},
            {"id": "good", "status": "ok", "imacs_r2g": -0.1 - 0.2, "seed": seed},
        ],
    )
    Image.new("RGB", (90, 20)).save(Path(tmp_path, "previews").mkdir() or tmp_path / "previews" / "good.jpg")
    summary = summarise(samples, store)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        of_csv = list(csv.DictReader(file))
    of_parquet = pq.read_table(tmp_path / "results.parquet").to_pylist()
    shown = error.replace("\udcff", "\\udcff")
    assert [row["error"] for row in of_csv] == [shown, ""]
    assert [row["error"] for row in of_parquet] == [shown, None]
    assert [row["imacs_r2g"] for row in of_csv] == ["", repr(-0.1 - 0.2)]
    assert [row["imacs_r2g"] for row in of_parquet] == [None, -0.1 - 0.2]
    assert of_parquet[1]["seed"] == seed
    assert [row["versions"] for row in of_parquet] == ["torch 2"] * 2
    assert summary["errors"] == {"bad": error}
    assert summary["scores"]["imacs_r2g"] == {"n": 1, "mean": -0.1 - 0.2, "sd": None, "low": None, "high": None}
    assert not list(tmp_path.glob("**/.i2am-*"))


def test_what_the_parquet_process_meets_is_told(tmp_path):
    """A disk that is full keeps its number: the command's exit code hangs on it."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = tmp_path / "t.csv"
    table.write_text(",".join(module.COLUMNS) + "\n" + "a,ok,,,,1.0,7,cpu,torch 2,\n")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left") as full:
            module._write_parquet(table, Path("/dev/full"))
        assert full.value.errno == 28
    with pytest.raises(OSError, match=r"t\.csv.*'much'.*double|double.*'much'"):
        table.write_text(",".join(module.COLUMNS) + "\n" + "a,ok,much,,,1.0,7,cpu,torch 2,\n")
        module._write_parquet(table, tmp_path / "t.parquet")


def test_the_parquet_process_has_no_torch(tmp_path):
    """Nor this package: it is there to be small. Modules of its folder are not taken for packages."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = tmp_path / "t.csv"
    table.write_text("id\na\n")
    check = (
        "import atexit, sys; atexit.register(lambda: print({'torch', 'i2am', 'pandas'} & {*sys.modules}, sys.path[0]))"
    )
    (tmp_path / "sitecustomize.py").write_text(check)
    command = [sys.executable, parquet.__file__, table, tmp_path / "t.parquet", json.dumps({"id": "string"})]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["set()", str(tmp_path)], done.stderr
    assert (tmp_path / "t.parquet").exists()


def test_a_finished_folder_is_gone_on_with_without_matplotlib_or_pyarrow(tmp_path):
    """They would take 100 MB of the 300 that a folder of 100,000 results may have."""
    store, samples = store_of(tmp_path / "out", [{"id": f"s{i}", "status": "ok", "imacs_r2g": 0.5} for i in range(3)])
    (tmp_path / "out" / "previews").mkdir()
    for sample in samples:
        Image.new("RGB", (90, 20)).save(store.path("previews", sample.id, ".jpg"))
    store.close()
    code = f"""
import sys
from i2am.evaluate import Sample, Store, summarise
store, samples = Store({str(tmp_path / "out")!r}), [Sample(f"s{{i}}", 7, digest="x") for i in range(3)]
store.open({SETTINGS!r})
assert store.pending(samples) == []
summarise(samples, store)
store.close()
print(sorted({{"matplotlib", "pyarrow", "pandas", "scipy", "diffusers"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["['scipy']"], done.stdout + done.stderr  # for the bootstrap of few values


def test_records_go_by(tmp_path, monkeypatch):
    """Of 5,000 records the summary holds a few numbers each: well below their texts."""
    rows = 5_000
    records = [
        {"id": f"s{i}", "status": "ok", "imacs_r2g": i % 7 / 7, "pictures": {}, "x": "x" * 500} for i in range(rows)
    ]
    store, samples = store_of(tmp_path / "out", records)
    del records
    monkeypatch.setattr(module, "contact_sheet", lambda *_: Image.new("RGB", (9, 9)))
    store.refresh()
    tracemalloc.start()
    summary = summarise(samples, store)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert summary["ok"] == rows
    assert summary["scores"]["imacs_r2g"]["mean"] == pytest.approx(np.mean([i % 7 / 7 for i in range(rows)]))
    assert most < 200 * rows


def test_the_interval_of_many_values_is_the_normal_one():
    """Where resampling stops, the two agree: neither a standard error of n nor one of one value."""
    x = np.random.default_rng(1).normal(0.3, 0.2, MANY)
    normal, resampled = interval(x), interval(x[: MANY - 1])
    assert normal["low"] == pytest.approx(x.mean() - 1.96 * x.std(ddof=1) / np.sqrt(MANY), abs=1e-6)
    assert normal["high"] - normal["low"] == pytest.approx(resampled["high"] - resampled["low"], rel=0.05)
    assert normal["sd"] == pytest.approx(x.std(ddof=1))


# --------------------------------------------------------------------------------------------------- contact sheet


def test_a_sheet_of_wide_and_of_small_strips(tmp_path):
    """Wide ones are scaled to the widest that there is room for, small ones stay as they are; nothing overlaps."""
    Image.new("RGB", (4000, 200), "red").save(tmp_path / "a.png")
    Image.new("RGB", (100, 30), "blue").save(tmp_path / "b.png")
    rows = [Row("best", "a", "x", tmp_path / "a.png"), Row("worst", "b", "y", tmp_path / "b.png")]
    sheet = np.asarray(contact_sheet(rows, 2, "box_iou")).astype(int)
    red, blue = ((sheet == c).all(2) for c in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() > 0.9 * 1350 * 67
    assert red.any(0).sum() == 1350
    assert blue.sum() == 100 * 30
    assert np.flatnonzero(red.any(1))[-1] < np.flatnonzero(blue.any(1))[0]
    assert sheet.shape[1] == 1350 + 30


def test_a_preview_that_is_gone_does_not_take_the_tables_with_it(tmp_path):
    store, samples = store_of(tmp_path, [{"id": f"s{i}", "status": "ok", "imacs_r2g": i / 2} for i in range(3)])
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / "s1.jpg").write_bytes(b"no picture")
    Image.new("RGB", (90, 30), "blue").save(tmp_path / "previews" / "s0.jpg", quality=95)
    assert summarise(samples, store)["ok"] == 3
    sheet = np.asarray(Image.open(tmp_path / "contact.png")).astype(int)
    grey = (sheet == 0xE0).all(2)
    assert 1.5 < grey.sum() / (750 * 42) < 2  # two of them, with letters on each
    assert (np.abs(sheet - (0, 0, 255)).max(2) < 12).sum() == 90 * 30


def test_long_ids_are_cut_and_scores_are_not():
    draw = ImageDraw.Draw(Image.new("RGB", (9, 9)))
    scores = "IMACS of R2G 0.123   Box IoU 0.456"
    whole = _fitting(draw, Row("best", "shirt", scores, Path()), 900)
    assert whole == f"best · shirt · {scores}"
    cut = _fitting(draw, Row("worst", "n" * 200, scores, Path()), 700)
    assert cut.startswith("worst · nnn")
    assert cut.endswith(f"n… · {scores}")
    assert 650 < draw.textlength(cut, font=_font(CAPTION)) <= 700
    assert draw.textlength("−·ш", font=_font(CAPTION)) > 15


def test_a_text_of_several_lines_may_lie_across_blocks(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    texts = [f"line {i}\nline {i + 1}\n\nthe last of {i}" for i in range(200)]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "error"], *([str(i), text] for i, text in enumerate(texts))])
    monkeypatch.setattr(parquet, "BLOCK", 100)
    parquet.convert(str(tmp_path / "t.csv"), str(tmp_path / "t.parquet"), {"id": "string", "error": "string"})
    assert pq.read_table(tmp_path / "t.parquet")["error"].to_pylist() == texts


def test_wide_strips_are_shrunk_as_they_are(tmp_path):
    wide, square = tmp_path / "wide.jpg", tmp_path / "square.jpg"
    Image.new("RGB", (2 * WIDEST, 400), "red").save(wide)
    Image.new("RGB", (WIDEST, 200), "red").save(square)
    rows = [[Row("best", "a", "", path), Row("worst", "a", "", path)] for path in (wide, square)]
    shrunk, same = (contact_sheet(two, 1, "imacs_r2g") for two in rows)
    assert shrunk.size == same.size
