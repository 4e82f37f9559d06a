"""``i2am demo``: a real pipeline on real photographs, offline."""

import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am import cli, demo

PICTURES = {
    "generated.png",
    "reference.png",
    "summary.png",
    *(f"{level}_{direction}.png" for level in ("ulam", "tlam", "hlam", "llam") for direction in ("r2g", "g2r")),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    with demo.one_thread():
        assert torch.get_num_threads() == 1
        yield
    assert torch.get_num_threads() == before


@pytest.fixture
def offline(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def test_demo_writes_everything(tmp_path, capsys, offline):
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "3"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == PICTURES | {"maps.safetensors", "i2am.json"}
    for name in PICTURES:
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.std() > 10  # not a blank page
    assert Image.open(tmp_path / "generated.png").size == (demo.SIZE, demo.SIZE)
    printed = capsys.readouterr().out
    assert "weights are random" in printed
    assert "summary.png" in printed
    assert str(tmp_path) in printed

    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert maps.ulam("r2g").shape == (1, 32, 32)
    assert maps.ulam("g2r").shape == (1, 16, 16)
    assert maps.hlam("r2g").shape[1] == 4
    seen = ~maps.tlam("r2g")[0].isnan().any(-1).any(-1)
    assert seen.tolist() == [True, True, False, True, False]  # step i of 3 is in group ⌊5i/3⌋
    for direction in ("r2g", "g2r"):  # there is something to see
        ulam = maps.ulam(direction, normalize="lift")
        assert ulam.max() > 1.3
        assert ulam.min() < 0.9


def test_demo_keeps_the_photograph_outside_the_mask():
    image, _, mask = demo.photographs()
    _, generated, _ = demo.run(steps=1)
    outside = np.asarray(mask) == 0
    difference = np.abs(np.asarray(generated, dtype=float) - np.asarray(image))[outside]
    assert difference.mean() < 12
    assert np.abs(np.asarray(generated, dtype=float) - np.asarray(image))[~outside].mean() > 30


def test_demo_is_the_same_for_the_same_seed():
    first, again, other = demo.run(1, seed=1), demo.run(1, seed=1), demo.run(1, seed=2)
    assert torch.equal(first[0].ulam("g2r"), again[0].ulam("g2r"))
    assert first[1].tobytes() == again[1].tobytes()
    assert first[1].tobytes() != other[1].tobytes()


def test_demo_looks_at_the_reference(monkeypatch):
    image, reference, mask = demo.photographs()
    maps, _, shown = demo.run(1)
    assert shown.tobytes() == reference.tobytes()
    monkeypatch.setattr(demo, "photographs", lambda: (image, reference.rotate(90), mask))
    turned = demo.run(1)[0].ulam("g2r")
    assert not torch.allclose(turned, maps.ulam("g2r"), rtol=0.05)


def test_building_the_pipeline_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    demo.build_pipeline()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_scikit_image(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("i2am: error:")
    assert 'pip install "i2am[demo]"' in error
    assert "\n" not in error


def test_photographs_missing_from_the_wheel(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "PHOTOGRAPHS", {"image": ("nowhere.png", (0, 0, 9, 9))})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "nowhere.png" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--steps", "many"), ("--seed", "-3")])
def test_wrong_options(tmp_path, capsys, option, value):
    assert cli.main(["demo", "--out", str(tmp_path), option, value]) == 2
    assert option in capsys.readouterr().err
