"""Manifests of every kind, and whatever else a file may hold."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from i2am.cli.images import open_image
from i2am.evaluate import read_manifest
from i2am.evaluate.identity import pictures_identity, stale_picture


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def red_of(sample, column="reference"):
    return open_image(column, sample.files[column], "RGB").getpixel((0, 0))[0]


def check_pictures(samples):
    """Two samples whose references are red 10 and 20, the first with an image of red 30."""
    assert [red_of(s) for s in samples] == [10, 20]
    assert red_of(samples[0], "image") == 30
    assert [s.texts for s in samples] == [{"prompt": "a cup"}, {"prompt": "b"}]
    assert samples[0].digest != samples[1].digest
    known = pictures_identity(samples[0])
    assert stale_picture(samples[0], known) is None
    assert "has changed" in stale_picture(samples[0], {k: [*v[:1], 0, "other"] for k, v in known.items()})


def test_webdataset_shards(tmp_path):
    def add(shard, name, contents):
        info = tarfile.TarInfo(name)
        info.size = len(contents)
        shard.addfile(info, io.BytesIO(contents))

    with tarfile.open(tmp_path / "s-000.tar", "w") as shard:
        add(shard, "d/a.reference.png", png(10))
        add(shard, "d/a.image.png", png(30))
        add(shard, "d/a.json", b'{"prompt": "a cup", "seed": 4}')
    with tarfile.open(tmp_path / "s-001.tar", "w") as shard:
        add(shard, "nothing.json", b"{}")  # no cell, so no sample
        add(shard, "b.png", png(20))
        add(shard, "b.txt", b"b")
    samples = read_manifest(tmp_path)
    assert [sample.id for sample in samples] == ["a", "b"]
    assert (samples[0].id, samples[0].seed) == ("a", 4)
    check_pictures(samples)
    (tmp_path / "s-001.tar").write_bytes((tmp_path / "s-001.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"s-001\.tar"):
        read_manifest(tmp_path)


def test_parquet_with_pictures(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "beside.png").write_bytes(png(30))
    table = pyarrow.table(
        {
            "id": ["a", "b"],
            "prompt": ["a cup", "b"],
            "seed": [7.0, float("nan")],  # as pandas writes whole numbers beside none
            "reference": [{"bytes": png(10), "path": None}, {"bytes": png(20), "path": None}],
            "image": ["beside.png", None],
        }
    )
    parquet.write_table(table, tmp_path / "m.parquet", row_group_size=1)
    samples = read_manifest(tmp_path / "m.parquet")
    assert samples[0].seed == 7
    check_pictures(samples)
    (tmp_path / "m.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="Parquet"):
        read_manifest(tmp_path / "m.parquet")


def test_a_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    picture = [Image.open(io.BytesIO(png(v))) for v in (10, 20, 30)]
    rows = {"id": ["a", "b"], "prompt": ["a cup", "b"], "reference": picture[:2], "image": [picture[2], None]}
    kinds = {"id": datasets.Value("string"), "prompt": datasets.Value("string")}
    kinds |= {"reference": datasets.Image(), "image": datasets.Image()}
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).save_to_disk(tmp_path / "d")
    check_pictures(read_manifest(tmp_path / "d"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "reference;image\nr;i\n", ["separated by ';'", "comma"]),
        ("m.csv", "reference,reference\nr,s\n", ["'reference'", "2 times"]),
        ("m.csv", "reference,\nr,s\n", ["column 2", "no name"]),
        ("m.csv", "image\ni\n", ["no column reference"]),
        ("m.csv", f"reference\n{'x' * 200_000}\n", ["line 2", "field larger"]),
        ("m.csv", f"id,reference\n{'é' * 150},r\n", ["line 2", "200 bytes"]),
        ("m.jsonl", '{"reference": "a", "reference": "b"}', ["line 1", "twice"]),
        ("m.jsonl", "[" * 100_000, ["line 1", "JSON"]),
        ("m.jsonl", '{"reference": ' + "[" * 100_000, ["line 1", "JSON"]),
        ("m.jsonl", '{"reference": "r", "seed": ' + "9" * 5000 + "}", ["line 1"]),
        ("m.jsonl", '{"reference": "r", "id": true}', ["id True"]),
    ],
)
def test_what_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read_manifest(tmp_path / name)
    assert len(str(error.value)) < 500 + len(str(tmp_path))
    for word in (name, *words):
        assert word in str(error.value)


def read_or_refused(path):
    """The samples, or none where the file is refused by its name; nothing else may happen."""
    try:
        return read_manifest(path)
    except ValueError as refusal:
        error = refusal
    assert str(path) in str(error)
    return []


CELL = st.one_of(st.text(max_size=8), st.integers(), st.floats(), st.none(), st.lists(st.integers(), max_size=5))
NAMES = st.sampled_from(["id", "reference", "image", "mask", "prompt", "seed", "box", "x", ""])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(NAMES, CELL, max_size=5), max_size=4), st.binary(max_size=60), st.sampled_from("abc"))
def test_any_contents_are_a_manifest_or_a_sentence(tmp_path_factory, rows, noise, kind):
    folder = tmp_path_factory.getbasetemp()
    path = folder / ("fuzz.csv" if kind == "b" else "fuzz.jsonl")
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes({"a": lines, "b": noise, "c": lines + b"\n" + noise}[kind])
    samples = read_or_refused(path)
    assert len({s.id for s in samples}) == len(samples)
    assert all(0 <= s.seed < 2**63 for s in samples)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=1200), st.integers(0, 1600))
def test_any_shard_is_a_manifest_or_a_sentence(tmp_path_factory, noise, at):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        info = tarfile.TarInfo("a.reference.png")
        info.size = 500
        shard.addfile(info, io.BytesIO(b"x" * 500))
    contents = bytearray(file.getvalue())
    contents[at : at + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(contents)
    read_or_refused(path)


def test_a_hundred_thousand_rows_stay_small(tmp_path):
    """Their cells are kept packed, samples are made when asked for: tens of bytes a row."""
    import tracemalloc

    rows = 20_000
    lines = (f"s{i:06d},{i}.png,picture-{i}.png,a photograph of number {i}" for i in range(rows))
    (tmp_path / "m.csv").write_text("id,reference,image,prompt\n" + "\n".join(lines))
    tracemalloc.start()
    samples = read_manifest(tmp_path / "m.csv")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50 * rows
    assert samples[12_345].texts == {"prompt": "a photograph of number 12345"}
    assert samples[-1].id == f"s{rows - 1:06d}"
    assert [s.id for s in samples.part([3, 1])] == ["s000003", "s000001"]
    assert np.unique([s.seed for s in samples[:100]]).size == 100


def written(folder, rows, columns="id,reference,seed,box"):
    (folder / "m.csv").write_text("\n".join([columns, *rows]))
    return folder / "m.csv"


def test_seeds_are_of_the_run_and_the_id(tmp_path):
    """A sample's seed depends on both, and on nothing else; one of its own on neither. Digests tell all of it apart."""
    path = written(tmp_path, ["a,r.png,,", "b,r.png,,", "c,r.png,9,"])
    zero, one = (read_manifest(path, seed) for seed in (0, 1))
    of_a = int.from_bytes(hashlib.sha256(b"1:a").digest()[:6], "big")
    assert one[0].seed == of_a
    assert zero[0].seed != of_a
    assert zero[2].seed == one[2].seed == 9
    assert [x.digest == y.digest for x, y in zip(zero, one, strict=True)] == [False, False, True]
    turned = read_manifest(written(tmp_path, ["b,r.png,,", "a,r.png,,"]), 1)
    assert (turned[1].seed, turned[1].digest) == (of_a, one[0].digest)
    edited = read_manifest(written(tmp_path, ["a,other.png,,"]), 1)
    assert edited[0].seed == of_a
    assert edited[0].digest != one[0].digest


@pytest.mark.parametrize("rows", [255, 256, 257, 512])
def test_rows_around_a_block_are_their_own(tmp_path, rows):
    """In any order, forwards, backwards and from the end; rows without an id are numbered as they stand."""
    samples = read_manifest(written(tmp_path, [f",{i}.png,{i}," for i in range(rows)]))
    assert len(samples) == rows
    for place in (rows - 1, 0, rows // 2, -1, -rows, rows - 2):
        sample, at = samples[place], place % rows
        assert (sample.id, sample.seed) == (f"row-{at + 1:05d}", at)
        assert sample.files["reference"] == tmp_path / f"{at}.png"
    with pytest.raises(IndexError):
        samples[rows]


@pytest.mark.parametrize("box", ["4 4 4 9", "4 4 9 4", "5 4 3 9", "4 9 8 3"])
def test_boxes_without_a_pixel_are_refused(tmp_path, box):
    with pytest.raises(ValueError, match="is empty"):
        read_manifest(written(tmp_path, [f"a,r.png,,{box}"]))


def test_ids_are_limited_in_bytes(tmp_path):
    """As file systems limit names: 150 letters of two bytes are too many, 150 of one are not."""
    assert read_manifest(written(tmp_path, [f"{'a' * 150},r.png,,"]))[0].id == "a" * 150
    with pytest.raises(ValueError, match="bytes"):
        read_manifest(written(tmp_path, [f"{'é' * 150},r.png,,"]))
