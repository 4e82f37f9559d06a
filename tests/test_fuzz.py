"""Whatever reads what people or other programs wrote has a target here, or where `TARGETS` says: any contents are read,
or refused by the error that is meant for it. A function that parses and has no target fails the first test.
"""

import argparse
import ast
import contextlib
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from i2am import _files, _images, zoo
from i2am.cli import arguments, results
from i2am.cli.arguments import UserError
from i2am.cli.completion import SHELLS
from i2am.cli.parts import _find
from i2am.cli.pipelines import class_name_in, find_class
from i2am.evaluate import Store, read_manifest
from i2am.evaluate.compare import read_run
from i2am.evaluate.journal import Journals
from i2am.evaluate.leases import Lease, owners
from i2am.evaluate.thumbnails import keep_levels, read_levels
from i2am.evaluate.trackers import Target, read_target
from i2am.maps import AttributionMaps, LayerSums
from i2am.zoo import storage

ROOT = Path(__file__).resolve().parents[1]
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Calls by which a function takes text or bytes apart.
PRIMITIVES = {
    *("loads", "literal_eval", "fromhex", "unpack", "unpack_from", "fromstring", "frombuffer"),
    *("fullmatch", "match", "safe_open", "load_file", "ParquetFile", "load_from_disk", "load_config"),
}
QUALIFIED = {("csv", "reader"), ("tarfile", "open"), ("Image", "open"), ("torch", "load"), ("np", "load")}
MANIFEST, MAPS, HERE = "tests/evaluate/test_manifest.py::", "tests/maps/test_file.py::", "tests/test_fuzz.py::"
TARGETS = {  # function that parses → the hypothesis test that feeds it
    "i2am/_files.py:abandoned": f"{HERE}test_any_name_of_a_file",
    "i2am/_files.py:parse_size": f"{HERE}test_any_text_is_an_option_or_a_sentence",
    "i2am/_images.py:open_image": f"{HERE}test_any_bytes_are_an_image_or_a_value_error",
    "i2am/_images.py:read_mask": f"{HERE}test_any_array_is_a_mask_and_a_picture_or_a_value_error",
    "i2am/_images.py:read_picture": f"{HERE}test_any_array_is_a_mask_and_a_picture_or_a_value_error",
    "i2am/_images.py:read_point": f"{HERE}test_any_value_is_a_point_or_none_or_a_value_error",
    "i2am/cli/arguments.py:part": f"{HERE}test_any_text_is_an_option_or_a_sentence",
    "i2am/cli/arguments.py:positive": f"{HERE}test_any_text_is_an_option_or_a_sentence",
    "i2am/cli/arguments.py:seed": f"{HERE}test_any_text_is_an_option_or_a_sentence",
    "i2am/cli/arguments.py:size": f"{HERE}test_any_text_is_an_option_or_a_sentence",
    "i2am/cli/__init__.py:main": "tests/cli/test_ends.py::test_any_words_end_with_a_code",
    "i2am/cli/completion.py:run": f"{HERE}test_any_name_of_an_option_completes",
    "i2am/cli/parts.py:_find": f"{HERE}test_any_model_index_is_a_pipeline_or_a_sentence",
    "i2am/cli/pipelines.py:check_adapter": f"{HERE}test_any_model_index_is_a_pipeline_or_a_sentence",
    "i2am/cli/pipelines.py:class_name_in": f"{HERE}test_any_model_index_is_a_pipeline_or_a_sentence",
    "i2am/cli/pipelines.py:find_class": f"{HERE}test_any_model_index_is_a_pipeline_or_a_sentence",
    "i2am/cli/results.py:prepare_output_dir": f"{HERE}test_any_settings_of_a_folder",
    "i2am/cli/results.py:written_before": f"{HERE}test_any_settings_of_a_folder",
    "i2am/evaluate/compare.py:read_run": f"{HERE}test_any_settings_of_a_folder",
    "i2am/evaluate/journal.py:_id": f"{HERE}test_any_journal_is_taken_in",
    "i2am/evaluate/journal.py:_take_line": f"{HERE}test_any_journal_is_taken_in",
    "i2am/evaluate/journal.py:__getitem__": f"{HERE}test_any_journal_is_taken_in",
    "i2am/evaluate/journal.py:read": f"{HERE}test_any_journal_is_taken_in",
    "i2am/evaluate/journal.py:reading": f"{HERE}test_any_journal_is_taken_in",
    "i2am/evaluate/leases.py:_owner": f"{HERE}test_any_lease_and_claim",
    "i2am/evaluate/leases.py:owners": f"{HERE}test_any_lease_and_claim",
    "i2am/evaluate/manifest.py:_box": f"{MANIFEST}test_any_contents_are_a_manifest_or_a_sentence",
    "i2am/evaluate/manifest.py:_id": f"{MANIFEST}test_any_contents_are_a_manifest_or_a_sentence",
    "i2am/evaluate/manifest.py:_seed": f"{MANIFEST}test_any_contents_are_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:_csv_rows": f"{MANIFEST}test_any_contents_are_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:read_object": f"{MANIFEST}test_any_contents_are_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:_shard_rows": f"{MANIFEST}test_any_shard_is_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:_parquet_rows": f"{HERE}test_any_parquet_is_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:_column": f"{HERE}test_any_parquet_is_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:_dataset_rows": f"{HERE}test_any_saved_dataset_is_a_manifest_or_a_sentence",
    "i2am/evaluate/sources.py:_dataset": f"{HERE}test_any_saved_dataset_is_a_manifest_or_a_sentence",
    "i2am/evaluate/store.py:_foreign": f"{HERE}test_any_name_of_a_file",
    "i2am/evaluate/store.py:settings": f"{HERE}test_any_settings_of_a_folder",
    "i2am/evaluate/thumbnails.py:read_levels": f"{HERE}test_any_levels_are_read_or_a_value_error",
    "i2am/evaluate/trackers.py:read_target": f"{HERE}test_any_text_is_an_option_or_a_sentence",
    "i2am/maps/entries.py:_read_all": f"{HERE}test_any_record_is_read_or_a_value_error",
    "i2am/maps/file.py:_read_record": f"{HERE}test_any_record_is_read_or_a_value_error",
    "i2am/maps/file.py:_read_safetensors": f"{MAPS}test_bytes_changed_anywhere_load_or_are_a_value_error",
    "i2am/maps/file.py:read_maps": f"{MAPS}test_a_header_changed_anywhere_loads_or_is_a_value_error",
    "i2am/zoo/storage.py:read": f"{HERE}test_any_weights_are_read_or_a_value_error",
}
OWN = {  # what these take apart this very process has made, or the package brings along
    "i2am/evaluate/compare.py:preview": "a preview that the store wrote whole",
    "i2am/evaluate/contact.py:_strip": "a preview that the store wrote whole; test_summary.py has it damaged",
    "i2am/evaluate/manifest.py:__getitem__": "rows packed in memory",
    "i2am/evaluate/parquet.py:main": "its parent's arguments",
    "i2am/evaluate/store.py:open": "a copy of its argument",
    "i2am/evaluate/trackers.py:sample": "a preview written a moment ago",
    "i2am/maps/__init__.py:match": "a call of its own match()",
    "i2am/maps/provenance.py:plain": "a copy of its argument",
    "i2am/tracing/flash.py:intercepted": "tensors of a packed batch",
    "i2am/tracing/flash.py:original": "tensors of a packed batch",
    "i2am/tracing/flash.py:through_varlen": "tensors of a packed batch",
    "i2am/zoo/data.py:photograph": "photographs of scikit-image",
    "i2am/zoo/train.py:_resume": "the trainer's own state, weights_only",
}


def parses(function):
    """Whether a function's own body calls one of the primitives."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in PRIMITIVES:
            return True
        if isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else getattr(called.value, "attr", "")
            if called.attr in PRIMITIVES or (owner, called.attr) in QUALIFIED:
                return True
    return False


def parsers():
    """Every function of the package that parses: "i2am/cli/arguments.py:seed"."""
    found = set()
    for path in sorted((ROOT / "i2am").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and parses(node):
                found.add(f"{path.relative_to(ROOT).as_posix()}:{node.name}")
    return found


def test_every_parser_has_a_target():
    found = parsers()
    assert "i2am/evaluate/journal.py:_take_line" in found
    missing = found - TARGETS.keys() - OWN.keys()
    assert not missing, f"no hypothesis test feeds {sorted(missing)}: write one, and name it in TARGETS"
    named = {name for name in TARGETS.keys() | OWN.keys() if name not in found}
    for name in named:  # what is listed beside them is there
        file, _, function = name.partition(":")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{name} is gone"
    assert not named & OWN.keys() - {"i2am/evaluate/contact.py:_strip"}
    for target in sorted({*TARGETS.values()}):
        file, _, test = target.partition("::")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert hasattr(getattr(module, test), "hypothesis"), f"{target} draws nothing"


# --------------------------------------------------------------------------------------------------------- what is fed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DEEP = st.just(5_000).map(lambda n: "[" * n + "]" * n)
TEXT = JSON.map(json.dumps) | DEEP | st.text(max_size=20)
PATCH = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4), st.integers(0, 60))


def patched(raw, patch, most=None):
    """Bytes with some of them replaced, within the first ``most``, and now and then an end that is missing."""
    at, new, cut = patch
    place = int(at * (min(len(raw), most) if most else len(raw)))
    raw = raw[:place] + new + raw[place + len(new) :]
    return raw[: len(raw) - cut] if cut < 20 else raw


class Files(dict):
    """Contents of files, which hypothesis need not print."""

    def __repr__(self):
        return "Files"


def small_maps(**more):
    sums = dict(grid=(4, 4), reference_grid=(3, 3), skip=0, keys=9, default=True, counts=(1,))
    values = dict(r2g=torch.rand(1, 1, 2, 16), g2r=torch.rand(1, 1, 2, 9))
    return AttributionMaps([LayerSums(layer="a", reference="r", **sums, **values)], **more)


# ------------------------------------------------------------------------------------------------------------- options

KINDS = (
    *(arguments.positive, arguments.time_groups, arguments.seed, arguments.number, arguments.size, arguments.nbytes),
    arguments.part,
)
WORDS = st.from_regex(
    r"[0-9]{1,20}([x×.][0-9]{0,7})?( ?[kKMGT]?B)?|steps|nan|-?inf|[-+]?[0-9]e[0-9]{1,3}|[a-z_]{1,3}=.{0,3}",
    fullmatch=True,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), WORDS | st.text(max_size=8))
def test_any_text_is_an_option_or_a_sentence(kind, text):
    try:
        value = kind(text)
    except argparse.ArgumentTypeError as refusal:
        assert str(refusal)  # noqa: PT017
    else:
        if kind is arguments.nbytes:
            assert 1 <= _files.parse_size(value) < 2**63
        elif kind is arguments.size:
            assert all(n > 0 and n % 8 == 0 for n in value)
        elif kind is arguments.part:
            assert "=".join(value) == text
            assert all(value)
        elif kind is arguments.number:
            assert np.isfinite(value)
        else:
            assert value == "steps" or 0 <= value < 2**63
    try:
        found = read_target(text)
    except ValueError as refusal:
        assert repr(text) in str(refusal)  # noqa: PT017
    else:
        assert isinstance(found, Target)


@FEW
@given(st.sampled_from(SHELLS), st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8))
def test_any_name_of_an_option_completes(shell, name):
    """The script is made from the parser, whatever its options are called."""
    from i2am.cli import completion

    parser = argparse.ArgumentParser()
    parser.add_argument(f"--{name}-option")
    commands = {"trace": completion._words(parser)}
    script = completion._fish(commands) if shell == "fish" else completion._bash(commands, shell)
    assert f"{name}-option" in script


@FEW
@given(st.text(max_size=30) | st.from_regex(_files.UNFINISHED, fullmatch=True))
def test_any_name_of_a_file(name):
    """Whether a file is one that a dead process has left is asked of every name in a folder."""
    from i2am.evaluate.store import _foreign

    path = Path("somewhere") / name.replace("/", "").replace("\0", "")
    assert _files.abandoned(path) in (True, False)
    assert _foreign(path) in (True, False)


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="module")
def pictures():
    """A small picture in every format that Pillow writes here, of several modes."""
    found, rng = [], np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (9, 12), dtype=np.uint16))
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA"):
        for image in (rgb, rgb.convert("L"), deep, rgb.convert("P")):
            file = io.BytesIO()
            try:
                image.save(file, kind)
            except (OSError, KeyError, ValueError):
                continue
            found.append(file.getvalue())
    assert len(found) > 15
    return found


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 10**6), patch=PATCH, noise=st.none() | st.binary(max_size=80))
def test_any_bytes_are_an_image_or_a_value_error(pictures, which, patch, noise):
    contents = patched(pictures[which % len(pictures)], patch, most=200) if noise is None else noise
    try:
        image = _images.open_image(io.BytesIO(contents))
    except ValueError as refusal:
        assert str(refusal)  # noqa: PT017
        return
    assert _images.as_rgb(image).mode == "RGB"
    try:
        assert _images.as_mask_image(image).mode == "L"
    except ValueError as refusal:
        assert str(refusal)  # noqa: PT017


DTYPES = st.sampled_from(["bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "float16", "float32"])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)


@settings(max_examples=120, deadline=None)
@given(st.data(), st.booleans(), st.integers(-1, 3))
def test_any_array_is_a_mask_and_a_picture_or_a_value_error(data, tensor, index):
    x = data.draw(arrays.arrays(data.draw(DTYPES), data.draw(SHAPES)))
    x = torch.from_numpy(x.copy()) if tensor else x
    try:
        mask, single = _images.read_mask(x)
    except ValueError as refusal:
        assert str(refusal)  # noqa: PT017
    else:
        assert mask.ndim == 3
        assert not single or len(mask) == 1
        assert 0 <= mask.min() <= mask.max() <= 1
    try:
        picture = _images.read_picture(x, index)
    except (ValueError, IndexError) as refusal:
        assert str(refusal)  # noqa: PT017
    else:
        assert picture.ndim == 3
        assert picture.shape[-1] == 3
        assert 0 <= picture.min() <= picture.max() <= 1


NUMBERS = (
    st.integers(-(2**80), 2**80)
    | st.floats()
    | st.booleans()
    | st.floats(width=16).map(np.float16)
    | st.text(max_size=2)
)


@FEW
@given(JSON | st.lists(NUMBERS, max_size=3) | st.tuples(NUMBERS, NUMBERS) | arrays.arrays("int32", (2,)))
def test_any_value_is_a_point_or_none_or_a_value_error(value):
    try:
        point = _images.read_point(value)
    except ValueError as refusal:
        assert "finite" in str(refusal)  # noqa: PT017
    else:
        assert point is None or (len(point) == 2 and all(isinstance(x, float) and np.isfinite(x) for x in point))


# ------------------------------------------------------------------------------------------------- manifests in tables


def refused_or_read(path):
    """Read a manifest and every picture of it: a ValueError that names the file or an OSError of a picture is fine."""
    try:
        samples = list(read_manifest(path))
    except ValueError as refusal:
        assert str(path) in str(refusal)  # noqa: PT017
        return
    for sample in samples:
        for picture in sample.files.values():
            if not isinstance(picture, Path):
                with contextlib.suppress(OSError, ValueError):
                    assert isinstance(picture.read_bytes(), bytes)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("parquet") / "m.parquet"
    cells = {"id": ["a", "b"], "seed": [1, 2], "reference": [{"bytes": b"x" * 40, "path": "p.png"}] * 2}
    pyarrow.parquet.write_table(pyarrow.table(cells), path)
    return path, path.read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patch=PATCH)
def test_any_parquet_is_a_manifest_or_a_sentence(parquet, patch):
    path, raw = parquet
    path.write_bytes(patched(raw, patch))
    refused_or_read(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path_factory.mktemp("dataset") / "d"
    rows = {"id": ["a", "b"], "reference": [Image.new("RGB", (3, 3))] * 2}
    kinds = datasets.Features({"id": datasets.Value("string"), "reference": datasets.Image()})
    datasets.Dataset.from_dict(rows, kinds).save_to_disk(folder)
    return folder, Files({path: path.read_bytes() for path in sorted(folder.iterdir())})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), patch=PATCH, text=st.none() | TEXT)
def test_any_saved_dataset_is_a_manifest_or_a_sentence(dataset, which, patch, text):
    folder, files = dataset
    for path, raw in files.items():
        path.write_bytes(raw)
    path = [*files][which % len(files)]
    path.write_bytes(patched(files[path], patch) if text is None else text.encode("utf-8", "surrogatepass"))
    refused_or_read(folder)


# ------------------------------------------------------------------------------------------------- folders of results

HEADER = {"journal": {"identity": "x", "versions": {}, "device": ""}}
RECORD = {"id": "a", "digest": "d", "status": "ok", "finished": 1.0, "pictures": {"reference": [1, 2, "h"]}}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([*RECORD]), JSON), max_size=3),
    st.lists(TEXT | st.binary(max_size=9), max_size=3),
)
@example([("pictures", [True])], [])
def test_any_journal_is_taken_in(tmp_path, changes, lines):
    """Lines of a disk that lost power count for nothing; those around them do."""
    records = [RECORD | {name: value} for name, value in changes] + [RECORD | {"id": "last"}]
    texts = [json.dumps(HEADER), *lines, *map(json.dumps, records)]
    raw = b"\n".join(x if isinstance(x, bytes) else x.encode("utf-8", "surrogatepass") for x in texts) + b"\n"
    (tmp_path / "p.jsonl").write_bytes(raw)
    journals = Journals(tmp_path, "x")
    journals.refresh()
    assert journals.entries["last"].ok
    with journals.reading() as read:
        for name in journals.entries:
            assert read(journals.entries[name])["id"] == name
    journals.forget({"nobody"})
    assert "last" in journals.entries
    (tmp_path / "p.jsonl").write_bytes(texts[-1].encode() + b"\n" + raw)  # a header that is none
    other = Journals(tmp_path, "x")
    other.refresh()
    assert not other.entries


@FEW
@given(TEXT)
def test_any_lease_and_claim(tmp_path, text):
    for name in ("elsewhere-1-x.lease", "sample~0"):
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    assert all(isinstance(owner.name, str) for owner in owners(tmp_path))
    with Lease(tmp_path) as lease:
        lease.others()
        assert lease.claim("sample") in (True, False)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=TEXT
    | st.dictionaries(st.sampled_from(["command", "files", "weights", "seed", "versions"]), JSON).map(json.dumps)
)
def test_any_settings_of_a_folder(tmp_path, text):
    (tmp_path / "i2am.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    for read in (Store(tmp_path).settings, lambda: read_run(tmp_path)):
        with contextlib.suppress(ValueError):
            read()
    try:
        results.prepare_output_dir(tmp_path)
    except UserError as refusal:
        assert "--out" in str(refusal)  # noqa: PT017


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    path = tmp_path_factory.mktemp("levels") / "a.safetensors"
    keep_levels(small_maps(), path)
    return path, path.read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patch=PATCH)
def test_any_levels_are_read_or_a_value_error(levels, patch):
    path, raw = levels
    path.write_bytes(patched(raw, patch, most=raw.index(b"}}") + 4))
    try:
        tensors, layers = read_levels(path)
    except ValueError as refusal:
        assert str(path) in str(refusal)  # noqa: PT017
    else:
        assert all(isinstance(x, torch.Tensor) for x in tensors.values())
        assert all(isinstance(name, str) for name in layers)


# ---------------------------------------------------------------------------------------------------- maps and weights


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """(maps of a traced model whose record is a file beside them, that file, its bytes)."""
    import i2am
    from tests.helpers.tiny_models.small import tiny_unet

    folder = tmp_path_factory.mktemp("record")
    unet = tiny_unet()
    told = dict(reference=i2am.Reference(grid=(2, 3)), num_steps=1, time_groups=1, record="qk", guidance="none")
    with i2am.patch_unet(unet, **told) as tracer, torch.no_grad():
        unet(torch.randn(1, unet.config.in_channels, 8, 8), 10, torch.randn(1, 6, unet.config.cross_attention_dim))
    path = tracer.maps().save(folder / "maps.safetensors", record=True)
    return path, path.read_bytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patch=PATCH)
def test_any_record_is_read_or_a_value_error(record, patch):
    path, raw = record
    start, end = raw.index(b"entries"), int.from_bytes(raw[:8], "little") + 8
    at, new, cut = patch
    place = start + int(at * (end - start))
    path.write_bytes(raw[:place] + new + raw[place + len(new) : len(raw) - (cut if cut < 10 else 0)])
    try:
        maps = AttributionMaps.load(path)
        maps.sram((1, 1), canvas=(8, 8))
    except (ValueError, FileNotFoundError) as refusal:
        assert str(refusal)  # noqa: PT017


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    raw = (zoo.WEIGHTS / "exemplar.safetensors").read_bytes()
    return tmp_path_factory.mktemp("weights") / "w.safetensors", raw


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(patch=PATCH)
def test_any_weights_are_read_or_a_value_error(weights, patch):
    path, raw = weights
    path.write_bytes(patched(raw, patch, most=int.from_bytes(raw[:8], "little") + 8))
    try:
        storage.read(path)
    except ValueError as refusal:
        assert str(path) in str(refusal)  # noqa: PT017


NAMES = st.sampled_from(
    ["StableDiffusionPipeline", "ReferenceInpaintingPipeline", "UNet2DConditionModel", "utils", "", "x"]
)
PARTS = st.dictionaries(
    st.text(max_size=5), JSON | st.lists(st.sampled_from(["diffusers", "x", "UNet2DConditionModel"]))
)


@FEW
@given(TEXT | st.builds(lambda name, parts: json.dumps({**parts, "_class_name": name}), NAMES | JSON, PARTS))
def test_any_model_index_is_a_pipeline_or_a_sentence(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    name = class_name_in(str(tmp_path))
    assert name is None or isinstance(name, str)
    try:
        found = find_class(str(tmp_path))
    except UserError as refusal:
        assert "PIPELINE" in str(refusal)  # noqa: PT017
    else:
        assert found.__name__ == name
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        part = _find("unet", str(tmp_path))
    except UserError as refusal:
        assert "--part" in str(refusal)  # noqa: PT017
    else:
        assert part.kind.__name__ in text
