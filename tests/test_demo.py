"""``i2am demo``: a trained model on real photographs, offline, whose maps can be checked against the truth."""

import shlex
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am import cli, demo, metrics
from i2am.zoo import data

PICTURES = {
    "demo.png",
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
    assert {p.name for p in tmp_path.iterdir()} >= PICTURES | {"maps.safetensors", "i2am.json", "report.html"}
    for name in PICTURES:
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.std() > 10  # not a blank page
    assert Image.open(tmp_path / "generated.png").size == (demo.SIZE, demo.SIZE)
    printed = capsys.readouterr().out
    assert demo.NOTE in printed
    for promised in ("IMACS +", "true source", "report.html", "i2am trace --help"):
        assert promised in printed
    assert "summary.png" in printed
    assert str(tmp_path) in printed

    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert maps.ulam("r2g").shape == maps.ulam("g2r").shape == (1, 32, 32)
    assert maps.hlam("r2g").shape[1] == 2
    seen = ~maps.tlam("r2g")[0].isnan().any(-1).any(-1)
    assert seen.tolist() == [True, True, False, True, False]  # step i of 3 is in group ⌊5i/3⌋


@pytest.mark.slow
def test_what_to_try_next_works(tmp_path, capsys, monkeypatch):
    """The commands that the demo prints, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--out", "first", "--steps", "1"]) == 0
    after = capsys.readouterr().out.split("Then try:\n")[1].splitlines()
    commands = [shlex.split(line, comments=True) for line in after]
    assert [c[:2] for c in commands] == [["i2am", "demo"], ["i2am", "compare"], ["i2am", "trace"]]
    for command in commands:
        more = ["--steps", "1"] if command[1] == "demo" else []
        assert cli.main([*command[1:], *more]) == 0
    assert (tmp_path / "first-1" / "demo.png").is_file()


def test_demo_maps_mean_something():
    task = demo.task()
    maps, generated, _ = demo.run(steps=4)
    assert metrics.ranking_auc(maps.ulam("r2g"), task.object[:, 0]).item() > 0.95
    taken = maps.sram(task.mask[0, 0])
    assert metrics.ranking_auc(taken, task.reference_object[:, 0]).item() > 0.95
    assert demo.share_inside(taken[0], task.reference_object[0, 0]) > 0.9
    picture = torch.from_numpy(np.array(generated.resize((64, 64), Image.BOX))).permute(2, 0, 1) / 127.5 - 1
    inside = task.object[0, 0] > 0
    error = (picture - task.picture[0]).abs()[:, inside].mean()
    assert error < 0.5 * (task.picture[0] - task.picture[0][:, ~inside].mean(1)[:, None, None]).abs()[:, inside].mean()


def test_demo_knows_where_its_patch_came_from():
    maps, generated, reference = demo.run(steps=2)
    found, true = demo.source(maps)
    assert np.hypot(*np.subtract(found, true)) < 4  # px; at random it is above 20
    eye = np.asarray(reference, dtype=float)[round(true[0] * 4) - 8 :, round(true[1] * 4) - 8 :][:16, :16].mean((0, 1))
    assert eye[2] < eye[1] - 40  # the greenish yellow of the cat's iris
    figure = demo.story(maps, generated, reference)
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels.count("attention, times its average") == 3  # every colour bar says what it shows
    assert len(demo.findings(maps)) == 6


def test_demo_says_when_the_map_misses(monkeypatch):
    maps, _, _ = demo.run(steps=1)
    task = demo.task()
    assert "on the painted garment" in demo.findings(maps)[0]
    monkeypatch.setattr(demo, "task", lambda: task._replace(object=0 * task.object, mask=1 - task.mask))
    assert "beside the painted garment" in demo.findings(maps)[0]
    assert "IMACS -" in demo.findings(maps)[3]


def test_reference_is_shown_as_a_cutout():
    task = demo.task()
    shown = np.asarray(demo.on_white(task).resize((64, 64), Image.BOX))
    outside = torch.nn.functional.max_pool2d(task.reference_object, 5, 1, 2)[0, 0].numpy() == 0
    assert (shown[outside] > 250).all()
    inside = torch.nn.functional.max_pool2d(1 - task.reference_object, 7, 1, 3)[0, 0].numpy() == 0
    there = (task.reference[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(shown - there)[inside].mean() < 8


def test_demo_keeps_the_photograph_outside_the_mask():
    task = demo.task()
    _, generated, _ = demo.run(steps=1)
    picture = torch.from_numpy(np.array(generated.resize((64, 64), Image.BOX))).permute(2, 0, 1) / 127.5 - 1
    outside = torch.nn.functional.max_pool2d(task.mask, 5, 1, 2)[0, 0] == 0  # enlarging mixes neighbours
    assert (picture - task.picture[0]).abs()[:, outside].mean() < 0.05


def test_demo_is_the_same_for_the_same_seed():
    first, again, other = demo.run(1, seed=1), demo.run(1, seed=1), demo.run(1, seed=2)
    assert torch.equal(first[0].ulam("g2r"), again[0].ulam("g2r"))
    assert first[1].tobytes() == again[1].tobytes()
    assert first[1].tobytes() != other[1].tobytes()


def test_demo_looks_at_the_reference(monkeypatch):
    maps, picture, shown = demo.run(1)
    task = demo.task()
    assert shown.tobytes() == demo.on_white(task).tobytes()
    monkeypatch.setattr(demo, "task", lambda: task._replace(reference=task.reference.flip(1)))
    turned_maps, turned, _ = demo.run(1)
    assert not torch.allclose(turned_maps.ulam("g2r"), maps.ulam("g2r"), rtol=0.01)
    assert turned.tobytes() != picture.tobytes()


def test_without_scikit_image(tmp_path, capsys, monkeypatch):
    data.photograph.cache_clear()
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("i2am: error:")
    assert 'pip install "i2am[demo]"' in error
    assert "\n" not in error


def test_photographs_missing_from_the_wheel(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "PHOTOGRAPHS", {"held-out": ("nowhere.png", "neither.png")})
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert 'pip install -U "i2am[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--steps", "many"), ("--seed", "-3")])
def test_wrong_options(tmp_path, capsys, option, value):
    assert cli.main(["demo", "--out", str(tmp_path), option, value]) == 2
    assert option in capsys.readouterr().err
