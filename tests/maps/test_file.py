"""The maps file: what 0.1 wrote still loads, every malformed file is refused by name, records stay in their folder."""

import contextlib
import itertools
import json
import logging
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from i2am.maps import AttributionMaps, LayerSums
from i2am.maps.entries import QKEntry, stamp_of, write_entries
from i2am.maps.file import FORMAT, VERSION

OLD = Path(__file__).with_name("maps-0.1.safetensors")
T, B, H, R = 2, 2, 2, 2


def numbers(*shape, start=0):
    """Multiples of 1/64 that repeat after 97, as the file of 0.1 was filled: exact in float16 too."""
    return (((torch.arange(torch.Size(shape).numel()) + start) % 97).float() / 64).reshape(shape)


def some_maps(record=True, **extra):
    """What was saved by 0.1: three layers, two references (one without a grid), two regions, masks, shared queries."""
    sums, entries = [], []
    for i, (layer, grid) in enumerate([("down.0", (2, 3)), ("mid.0", (1, 2)), ("up.0", (3, 4))]):
        Q = grid[0] * grid[1]
        shared = {"q": numbers(B, H, Q, 4, start=i).half(), "row_lse": numbers(B, H, Q, start=3 + i) + 3}
        for j, (name, reference_grid, skip) in enumerate([("garment", (2, 2), 1), ("face", None, 0)]):
            K = 5 if reference_grid else 3
            sums.append(
                LayerSums(
                    layer=layer,
                    reference=name,
                    grid=grid,
                    reference_grid=reference_grid,
                    skip=skip,
                    keys=8,
                    default=layer != "mid.0",
                    counts=(2, 1),
                    r2g=numbers(T, B, H, Q, start=5 + i + j),
                    g2r=numbers(T, B, H, K, start=7 + i + j),
                    mass=numbers(T, B, H, Q, start=11 + i + j) if name == "garment" else None,
                    sram=numbers(T, B, H, R, K, start=13 + i + j),
                )
            )
            own = {"k": numbers(B, H, K, 4, start=17 + i + j).half(), "col_lse": numbers(B, H, K, start=19 + i + j) + 3}
            if name == "garment":
                own["mask"] = (torch.arange(K) != K - 1).reshape(1, 1, 1, K).expand(B, 1, 1, K).contiguous()
            entries += [QKEntry(layer, name, group, 0.5, tensors=shared | own) for group in (0, 1)]
    extra = {"canvas": (24, 32), "regions": ["corner", "sleeve"]} | extra
    return AttributionMaps(sums, entries=entries if record else (), **extra)


def assert_same(a, b):
    """Every field of every layer, region and recorded call."""
    assert (a.canvas, a.regions, a.provenance, a.layers) == (b.canvas, b.regions, b.provenance, b.layers)
    for x, y in zip(a._sums, b._sums, strict=True):
        for name in LayerSums.__dataclass_fields__:
            x_, y_ = getattr(x, name), getattr(y, name)
            assert x_.equal(y_) if isinstance(x_, torch.Tensor) else x_ == y_, name
    for x, y in zip(a._entries, b._entries, strict=True):
        assert (x.layer, x.reference, x.group, x.scale) == (y.layer, y.reference, y.group, y.scale)
        assert list(x.read()) == list(y.read())
        assert all(x.read()[name].equal(y.read()[name]) for name in x.read())


def test_a_file_of_0_1_loads_with_equal_values():
    loaded = AttributionMaps.load(OLD)
    assert_same(loaded, some_maps())
    assert loaded.provenance == {}
    for ask in ((3, 5), "sleeve"):
        assert loaded.sram(ask, reference="garment").equal(some_maps().sram(ask, reference="garment"))
    want = torch.tensor([[0.0717, 0.0758], [0.0804, 0.0]])  # printed by the version that wrote the file
    torch.testing.assert_close(loaded.sram((3, 5), reference="garment")[0], want, atol=5e-5, rtol=0)


def test_the_header_is_written_field_by_field(tmp_path):
    """As docs/maps-format.md lists it; a renamed attribute must not rename a field."""
    path = some_maps(provenance={"steps": 4}).save(tmp_path / "m.safetensors")
    head, meta, _ = parts(path)
    assert head["__metadata__"]["format"] == FORMAT == "i2am-maps-1"
    assert list(meta) == ["version", "provenance", "canvas", "regions", "layers", "record"]
    assert (meta["version"], meta["provenance"], meta["canvas"]) == (VERSION, {"steps": 4}, [24, 32])
    assert meta["layers"][0] == {
        "layer": "down.0",
        "reference": "garment",
        "grid": [2, 3],
        "reference_grid": [2, 2],
        "skip": 1,
        "keys": 8,
        "default": True,
        "counts": [2, 1],
    }
    names = {"q": "record.0", "row_lse": "record.1", "k": "record.2", "col_lse": "record.3", "mask": "record.4"}
    assert meta["record"]["entries"][1] == ["down.0", "garment", 1, 0.5, None, names]
    assert {name for name in head if name.startswith("0.")} == {"0.r2g", "0.g2r", "0.mass", "0.sram"}
    page = (Path(__file__).parents[2] / "docs" / "maps-format.md").read_text(encoding="utf-8")
    for field in (*meta, *meta["layers"][0], *names, "entries", "files", f"version` {VERSION}"):
        assert f"`{field}" in page, field


def test_provenance_travels(tmp_path):
    told = {"summary": ["mean of 4 steps", "1 of 2 parts is conditional"], "calls": {"seen": 8, "passed by": None}}
    maps = some_maps(provenance=told)
    told["calls"]["seen"] = 9  # a copy
    loaded = AttributionMaps.load(maps.save(tmp_path / "m.safetensors"))
    assert loaded.provenance["calls"] == {"seen": 8, "passed by": None}
    assert repr(loaded).splitlines()[1:] == ["  mean of 4 steps", "  1 of 2 parts is conditional"]
    assert "calls · seen</th><td>8" in loaded._repr_html_()
    for wrong in ({"tensor": torch.ones(1)}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="plain JSON"):
            some_maps(provenance=wrong)


def test_repr_without_a_summary_shows_the_plain_values():
    maps = some_maps(provenance={"pipeline": "X", "steps": 50, "layers": ["a", "b"], "long": "y" * 200})
    first, second = repr(maps).splitlines()
    assert first.startswith("AttributionMaps(3 layers, references 'garment', 'face', batch 2")
    assert second.startswith("  pipeline X, steps 50, long yyy")
    assert second.endswith("…")
    assert len(second) < 120


# -------------------------------------------------------------------------------------------------- malformed files


def parts(path):
    """(safetensors header, maps header, bytes of the tensors) of a file."""
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + n])
    return head, json.loads(head["__metadata__"]["maps"]), raw[8 + n :]


def write(path, head, maps, body):
    text = maps if isinstance(maps, str) else json.dumps(maps)
    data = json.dumps(head | {"__metadata__": head["__metadata__"] | {"maps": text}}).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + body)


@pytest.fixture
def saved(tmp_path):
    path = some_maps(provenance={"steps": 4}).save(tmp_path / "maps.safetensors")
    return path, *parts(path)


GONE = object()


def changed(value, keys, to):
    value = json.loads(json.dumps(value))
    at = value
    for key in keys[:-1]:
        at = at[key]
    if to is GONE:
        del at[keys[-1]]
    else:
        at[keys[-1]] = to
    return value


DEEP = "[" * 100_000
MALFORMED = {
    "no JSON": ("{", "header is not JSON"),
    "nothing": ("", "header is not JSON"),
    "nested too deeply": (DEEP, "header is not JSON"),
    "not an object": ("[]", "header must be an object"),
    "canvas is missing": (("canvas",), GONE, "header has no field 'canvas'"),
    "a field too many": (("more",), 1, "header has a field that this format does not know, 'more'"),
    "version": (("version",), "2", "version must be an integer"),
    "newer version": (("version",), VERSION + 1, "written by a newer i2am"),
    "provenance": (("provenance",), [1], "provenance must be an object"),
    "provenance NaN": (("provenance",), {"a": float("nan")}, "provenance: .*plain JSON"),
    "canvas": (("canvas",), [24], r"canvas must have 2 entries"),
    "canvas of zero": (("canvas",), [24, 0], r"canvas\[1\] must be an integer of at least 1"),
    "regions": (("regions",), "corner", "regions must be a list"),
    "regions twice": (("regions",), ["a", "a"], "regions must name each region once"),
    "a region too many": (("regions",), ["a", "b", "c"], r"down\.0.*sram has shape"),
    "no regions": (("regions",), [], "sram has shape"),
    "layers is null": (("layers",), None, "layers must be a list"),
    "layers is a string": (("layers",), "x", "layers must be a list"),
    "layers is empty": (("layers",), [], "layers must have 1 or more"),
    "a layer too few": (("layers", 5), GONE, "tensor '5.g2r' belongs to no layer"),
    "a layer is null": (("layers", 1), None, r"layers\[1\] must be an object"),
    "a layer's field too many": (("layers", 0, "more"), 1, r"layers\[0\] has a field .* 'more'"),
    "a layer's field too few": (("layers", 0, "skip"), GONE, r"layers\[0\] has no field 'skip'"),
    "layer": (("layers", 0, "layer"), 3, r"layers\[0\]\.layer must be a string"),
    "layer twice": (("layers", 0, "layer"), "mid.0", "mid.0.*listed twice"),
    "reference": (("layers", 0, "reference"), None, r"layers\[0\]\.reference must be a string"),
    "huge grid": (("layers", 0, "grid"), [10**6, 10**6], r"grid \(1000000, 1000000\)"),
    "endless grid": (("layers", 0, "grid"), [10**30, 1], r"layers\[0\]\.grid\[0\] must be an integer"),
    "negative grid": (("layers", 0, "grid"), [-1, 4], r"layers\[0\]\.grid\[0\] must be"),
    "grid of floats": (("layers", 0, "grid"), [2.0, 3], r"layers\[0\]\.grid\[0\] must be"),
    "grid of three": (("layers", 0, "grid"), [1, 2, 3], r"layers\[0\]\.grid must have 2"),
    "grid turned": (("layers", 4, "grid"), [3, 5], r"up\.0.*r2g has shape"),
    "reference_grid": (("layers", 0, "reference_grid"), "x", r"layers\[0\]\.reference_grid must be a list"),
    "reference_grid too small": (("layers", 0, "reference_grid"), [2, 1], "g2r has shape"),
    "skip": (("layers", 0, "skip"), -1, r"skip must be an integer of at least 0"),
    "skip of all": (("layers", 1, "skip"), 3, "leaves none"),
    "skip of a flag": (("layers", 0, "skip"), True, r"skip must be an integer"),
    "keys": (("layers", 0, "keys"), 0, r"keys must be an integer of at least 1"),
    "default": (("layers", 0, "default"), 1, r"default must be true or false"),
    "counts too few": (("layers", 0, "counts"), [1], "counts has 1 entries for 2 time groups"),
    "counts too many": (("layers", 2, "counts"), [1, 1, 1], "counts has 3 entries for 2 time groups"),
    "counts negative": (("layers", 0, "counts"), [1, -1], r"counts\[1\] must be"),
    "record is null": (("record",), None, "record must be an object"),
    "entries": (("record", "entries"), {}, r"record\.entries must be a list"),
    "files": (("record", "files"), [], r"record\.files must be an object"),
    "entry too short": (("record", "entries", 0), ["down.0"], r"entries\[0\] must have 6"),
    "entry of no layer": (("record", "entries", 0, 0), "x", r"entries\[0\] is of a layer"),
    "entry of no group": (("record", "entries", 0, 2), 2, r"entries\[0\]\[2\] must be one of 2 time groups"),
    "entry of a flag": (("record", "entries", 0, 2), True, r"entries\[0\]\[2\] must be an integer"),
    "scale": (("record", "entries", 0, 3), float("inf"), r"entries\[0\]\[3\] must be a finite number"),
    "endless scale": (("record", "entries", 0, 3), 10**400, r"entries\[0\]\[3\] must be a finite number"),
    "unlisted file": (("record", "entries", 0, 4), "x.safetensors", "is not one of record.files"),
    "names": (("record", "entries", 0, 5), {"q": "0"}, "has no field 'row_lse'|has no field 'k'"),
    "a name too many": (("record", "entries", 0, 5, "v"), "record.0", "does not know, 'v'"),
    "name of nothing": (("record", "entries", 0, 5, "q"), "record.99", "refers to tensor 'record.99'"),
    "name of another": (("record", "entries", 0, 5, "q"), "0.r2g", "has q of shape"),
    "mask of another": (("record", "entries", 0, 5, "mask"), "record.0", "has a mask of shape"),
    "k of another layer": (("record", "entries", 0, 5, "k"), "record.5", "has k of shape"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_header_is_refused_with_file_and_field(what, saved):
    path, head, maps, body = saved
    *keys_and_value, message = MALFORMED[what]
    text = keys_and_value[0] if len(keys_and_value) == 1 else changed(maps, *keys_and_value)
    write(path, head, text, body)
    with pytest.raises(ValueError, match=message) as refused:
        AttributionMaps.load(path)
    assert path.name in str(refused.value)
    assert len(str(refused.value)) < 700


def places_in(value, above=()):
    """Every place of a JSON value, as keys one below the other."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield (*above, key)
        yield from places_in(below, (*above, key))


def test_a_refusal_shows_little_of_a_long_value(saved):
    """Whatever text or list of a header is endless, and whichever key: a sentence, not the file's own megabyte."""
    path, head, maps, body = saved
    kinds = itertools.cycle(["a" * 5000, ["b" * 5000], {"c" * 5000: 1}, "a" * 5000])
    seen = set()
    for place in places_in(maps):
        pattern = tuple(0 if isinstance(key, int) else key for key in place)
        if pattern in seen:  # one layer, one entry of the record stand for all
            continue
        seen.add(pattern)
        write(path, head, changed(maps, place, next(kinds)), body)
        with contextlib.suppress(ValueError):
            AttributionMaps.load(path)
            continue
        with pytest.raises(ValueError) as refused:
            AttributionMaps.load(path)
        name = 5000 if place[-1] in ("layer", "reference") else 0  # which messages give whole
        assert len(str(refused.value)) < 1200 + name, place


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("0.r2g", [2, 2, 2, 5], "r2g has shape"),
        ("0.r2g", [2, 2, 2, 3, 2], "r2g has shape|reference 'garment'"),
        ("2.g2r", [1, 2, 2, 10], "g2r has shape"),
        ("2.r2g", [1, 2, 2, 4], "r2g has shape"),  # one time group and twice the tokens
        ("4.mass", [2, 1, 4, 12], "mass has shape"),
        ("0.sram", [2, 2, 2, 10], "sram has shape"),
    ],
)
def test_tensors_must_fit_the_header(name, shape, message, saved):
    path, head, maps, body = saved
    first = head[name]
    start, n = first["data_offsets"][0], 4 * torch.Size(shape).numel()
    assert n <= first["data_offsets"][1] - start
    pad = {
        "shape": [first["data_offsets"][1] - start - n],
        "dtype": "U8",
        "data_offsets": [start + n, first["data_offsets"][1]],
    }
    new = head | {name: first | {"shape": shape, "data_offsets": [start, start + n]}}
    write(path, new | ({"record.pad": pad} if pad["shape"][0] else {}), maps, body)
    with pytest.raises(ValueError, match=message) as refused:
        AttributionMaps.load(path)
    assert path.name in str(refused.value)


def test_a_layer_without_its_tensor(tmp_path):
    path = some_maps().save(tmp_path / "maps.safetensors")
    head, *_ = parts(path)
    save_file({"0.r2g": torch.ones(2, 2, 2, 6)}, path, metadata=head["__metadata__"])
    with pytest.raises(ValueError, match=r"maps\.safetensors: layers\[0\] has no tensor 0\.g2r"):
        AttributionMaps.load(path)
    tensors = {"0.r2g": torch.ones(2, 2, 2, 6).int(), "0.g2r": torch.ones(2, 2, 2, 5)}
    save_file(tensors, path, metadata=head["__metadata__"])
    with pytest.raises(ValueError, match=r"0\.r2g of torch\.int32, not float32"):
        AttributionMaps.load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


class Target:
    """A file and its parts, which hypothesis need not print."""

    def __init__(self, path):
        self.path, self.raw = path, path.read_bytes()
        self.head, self.maps, self.body = parts(path)

    def __repr__(self):
        return "Target()"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return Target(some_maps(provenance={"steps": 4}).save(tmp_path_factory.mktemp("fuzz") / "maps.safetensors"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_header_changed_anywhere_loads_or_is_a_value_error(target, data):
    """Any value of the header replaced, removed or added: what loads can be read at every level and asked."""
    maps = target.maps
    at, new = maps, json.loads(json.dumps(maps))
    copy = new
    while True:
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(at[key], (dict, list)) or data.draw(st.integers(0, 3)) == 0:
            break
        at, copy = at[key], copy[key]
    what = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if what == "add" and isinstance(copy, dict):
        copy[data.draw(st.text(max_size=3))] = data.draw(JSON)
    elif what == "add" and isinstance(copy, list):
        copy.append(data.draw(JSON))
    elif key is not None and what == "remove":
        del copy[key]
    elif key is not None:
        copy[key] = data.draw(JSON)
    write(target.path, target.head, new, target.body)
    assert_loads_or_is_refused(target.path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), byte=st.binary(min_size=1, max_size=4), cut=st.integers(0, 40))
def test_bytes_changed_anywhere_load_or_are_a_value_error(target, at, byte, cut):
    path, raw = target.path, target.raw
    n = struct.unpack("<Q", raw[:8])[0] + 8
    place = int(at * (n + 10))  # in the headers: what follows are numbers
    path.write_bytes(raw[:place] + byte + raw[place + len(byte) : len(raw) - (cut if cut < 4 else 0)])
    assert_loads_or_is_refused(path)


def assert_loads_or_is_refused(path):
    try:
        maps = AttributionMaps.load(path)
    except (ValueError, FileNotFoundError) as error:  # a record that is named and not there
        assert path.name in str(error)  # noqa: PT017
        return
    for reference in maps.references:
        maps.tlam("r2g", reference=reference)
        maps.counts(reference)
        if maps.recorded:
            try:
                maps.sram((0, 0), reference=reference)
            except (ValueError, IndexError) as error:
                assert "no SRAM" in str(error) or "finite" in str(error)  # noqa: PT017
    repr(maps)


# ----------------------------------------------------------------------------------------------- records on disk


@pytest.fixture
def on_disk(tmp_path):
    """Maps beside the folder of their record."""
    (tmp_path / "record").mkdir()
    maps = some_maps()
    maps._entries = write_entries(tmp_path / "record" / "000000.safetensors", maps._entries)
    return maps, maps.save(tmp_path / "maps.safetensors")


def rename_record(path, name):
    """The maps file with another name for its record's file."""
    head, maps, body = parts(path)
    (old, size), *_ = maps["record"]["files"].items()
    maps["record"]["files"] = {name: size}
    maps["record"]["entries"] = [[name if x == old else x for x in entry] for entry in maps["record"]["entries"]]
    write(path, head, maps, body)


def test_a_record_on_disk_is_named_by_its_place_below_the_file(on_disk):
    _, path = on_disk
    assert list(parts(path)[1]["record"]["files"]) == ["record/000000.safetensors"]
    assert_same(AttributionMaps.load(path), some_maps())


@pytest.mark.parametrize(
    "how", ["absolute", "above", "through a link", "a pipe", "a folder", "a circle", "NUL", "long"]
)
def test_a_record_may_only_be_a_regular_file_below_the_maps_folder(how, on_disk, tmp_path):
    _, path = on_disk
    record = tmp_path / "record" / "000000.safetensors"
    inner = tmp_path / "inner"
    inner.mkdir()
    path = path.rename(inner / path.name)
    (inner / "link").symlink_to(tmp_path / "record")
    os.mkfifo(inner / "pipe")
    (inner / "circle").symlink_to(inner / "circle")
    name = {
        "absolute": str(record),
        "above": "../record/000000.safetensors",
        "through a link": "link/000000.safetensors",
        "a pipe": "pipe",
        "a folder": ".",
        "a circle": "circle/x",
        "NUL": "a\0b",
        "long": "x" * 5000,
    }[how]
    rename_record(path, name)
    with pytest.raises(ValueError, match=r"maps\.safetensors: record\.files\.") as refused:
        AttributionMaps.load(path)
    assert len(str(refused.value)) < 12_000
    if how in ("absolute", "above", "through a link"):
        assert "record_anywhere=True" in str(refused.value)
        assert_same(AttributionMaps.load(path, record_anywhere=True), some_maps())
    else:
        with pytest.raises(ValueError, match=r"record\.files\."):
            AttributionMaps.load(path, record_anywhere=True)


def test_saving_away_from_the_record_says_so(on_disk, tmp_path, caplog):
    maps, _ = on_disk
    (tmp_path / "away").mkdir()
    with caplog.at_level(logging.WARNING, logger="i2am"):
        away = maps.save(tmp_path / "away" / "maps.safetensors")
    assert "record_anywhere=True" in caplog.text
    with pytest.raises(ValueError, match="lies outside the folder"):
        AttributionMaps.load(away)
    assert_same(AttributionMaps.load(away, record_anywhere=True), some_maps())
    assert_same(AttributionMaps.load(maps.save(away, embed=True)), some_maps())


def test_a_record_file_is_checked_when_it_loads_and_when_it_is_read(on_disk, tmp_path):
    _, path = on_disk
    record, other = tmp_path / "record" / "000000.safetensors", tmp_path / "other"
    loaded = AttributionMaps.load(path)
    whole = record.read_bytes()
    save_file({"0": torch.ones(3)}, other)
    for size in (len(whole) - 1, len(whole) + 1):
        record.write_bytes((whole + b"x")[:size])
        with pytest.raises(
            ValueError, match=rf"000000\.safetensors is truncated or another file: {size} bytes instead of {len(whole)}"
        ):
            AttributionMaps.load(path)
    record.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=r"000000\.safetensors is damaged"):
        AttributionMaps.load(path)
    for broken in (b"x" * len(whole), other.read_bytes()):
        record.write_bytes(broken)
        with pytest.raises(ValueError, match=r"000000\.safetensors is (damaged or was|another run's .* was) replaced"):
            loaded.sram((0, 0), reference="garment")
    record.unlink()
    with pytest.raises(FileNotFoundError, match=r"000000\.safetensors is not there any more"):
        loaded.sram((0, 0), reference="garment")
    with pytest.raises(FileNotFoundError, match="refers to the record"):
        AttributionMaps.load(path)


def test_a_record_of_another_run_is_refused(on_disk, tmp_path):
    """Same names, same shapes, same size: told by its stamp, when it loads and when it is read later."""
    _, path = on_disk
    record = tmp_path / "record" / "000000.safetensors"
    loaded, size = AttributionMaps.load(path), record.stat().st_size
    with safe_open(record, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, record, metadata)
    assert_same(AttributionMaps.load(path), loaded)  # the same run's, written again
    other = {name: x + 1 if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(other, record, metadata | {"record": "0" * 32})
    assert record.stat().st_size == size
    for read in (lambda: AttributionMaps.load(path), lambda: loaded.sram((0, 0), reference="garment")):
        with pytest.raises(ValueError, match=r"000000\.safetensors is another run's .*: it was replaced"):
            read()


def test_an_embedded_record_that_was_replaced_is_refused(tmp_path):
    path = some_maps().save(tmp_path / "maps.safetensors", embed=True)
    loaded = AttributionMaps.load(path)
    assert loaded.sram((0, 0), reference="garment").isfinite().all()
    head, header, body = parts(path)
    write(path, head | {"__metadata__": head["__metadata__"] | {"record": "f" * 32}}, header, body)
    with pytest.raises(ValueError, match="another run's"):
        loaded.sram((0, 0), reference="garment")


def test_stamps_tell_runs_apart_and_are_the_same_for_the_same(tmp_path):
    entries = [e if e.file is None else replace(e, tensors=e.read(), file=None) for e in some_maps()._entries]
    changed = [replace(e, tensors=e.tensors | {"row_lse": e.tensors["row_lse"] + 1e-3}) for e in entries]
    assert stamp_of(entries) == stamp_of(list(entries)) != stamp_of(changed)
    assert stamp_of(entries[::-1]) != stamp_of(entries)


def test_a_save_through_a_link_finds_its_record(on_disk, tmp_path):
    """The record's place is told from where the file really lies."""
    maps, _ = on_disk
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "short").symlink_to(deep)
    maps.save(tmp_path / "short" / "maps.safetensors")
    assert list(parts(deep / "maps.safetensors")[1]["record"]["files"]) == ["../../record/000000.safetensors"]
    assert_same(AttributionMaps.load(deep / "maps.safetensors", record_anywhere=True), some_maps())


def test_maps_refuse_sums_that_no_level_could_read():
    good = some_maps(record=False)._sums
    for changes, message in (
        (dict(grid=(3, 3)), "r2g has shape"),
        (dict(counts=(1,)), "counts has 1"),
        (dict(sram=None), "no sram, although 2 regions"),
        (dict(r2g=good[0].r2g[0]), "r2g has shape"),
        (dict(g2r=good[0].g2r.int()), "floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            AttributionMaps([replace(good[0], **changes), *good[1:]], regions=["corner", "sleeve"])
    with pytest.raises(ValueError, match="no maps without"):
        AttributionMaps([])


def test_a_file_replaced_between_its_header_and_its_tensors_is_read_again(tmp_path, monkeypatch):
    """safetensors opens a path twice: what a save in between makes of it belongs to neither file."""
    from i2am.maps import file

    path = tmp_path / "maps.safetensors"

    def save(value, layers):
        x = torch.full((1, 1, 2, 6), value)
        sums = [LayerSums(f"l{i}", "r", (2, 3), (2, 3), 0, 6, True, (1,), x.clone(), x.clone()) for i in range(layers)]
        AttributionMaps(sums).save(path)

    save(1.0, 2)
    read, times = file._read_safetensors, []

    def replaced(where):
        times.append(1)
        if len(times) == 1:
            read(where)
            save(2.0, 3)
            raise RuntimeError("size <1> is smaller than the required mapping size <2>")
        return read(where)

    monkeypatch.setattr(file, "_read_safetensors", replaced)
    assert AttributionMaps.load(path).layers == ["l0", "l1", "l2"]
    assert len(times) == 2

    def always(where):
        save(3.0, 1)
        return read(where)

    monkeypatch.setattr(file, "_read_safetensors", always)
    with pytest.raises(ValueError, match="was replaced each of the 100 times"):
        AttributionMaps.load(path)
