"""The page of ``i2am app``: what it runs and shows, with and without Gradio."""

import argparse
import builtins
from html import unescape

import pytest
import torch
from PIL import Image

from i2am import app
from i2am.cli import main
from i2am.cli.app import add_arguments, pipeline_session, zoo_session
from i2am.cli.arguments import UserError
from tests.helpers.saved_pipelines import images, inpaint, paint_by_example

__all__ = ["images", "inpaint", "paint_by_example"]  # fixtures


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def pictures(folder):
    return {name: Image.open(folder / f"{name}.png") for name in ("reference", "image", "mask")}


@pytest.fixture
def exemplar():
    return zoo_session("exemplar", time_groups=2)


def test_zoo_answer(exemplar, images, tmp_path):
    found = app.answer(exemplar, pictures(images), 3, {"steps": 2}, tmp_path)
    assert found.generated.size == (64, 64)
    assert "IMACS" in found.said
    assert "1 run of 2 steps" in found.said
    assert [name.rpartition("/")[2] for name in found.files] == ["report.html", "maps.safetensors"]
    page = unescape(found.report.partition('srcdoc="')[2].rpartition('"')[0])
    assert page == (tmp_path / "report.html").read_text("utf-8")  # nothing of it is lost by being inside another page


def test_seed_and_steps_reach_the_model(exemplar, images):
    def generated(seed, steps):
        made = exemplar.run(pictures(images), seed, {"steps": steps})
        return torch.frombuffer(bytearray(made.generated.tobytes()), dtype=torch.uint8)

    first = generated(0, 1)
    assert torch.equal(first, generated(0, 1))
    assert not torch.equal(first, generated(1, 1))
    assert not torch.equal(first, generated(0, 2))


def test_zoo_examples_are_runnable_rows(exemplar):
    pytest.importorskip("skimage")
    assert {len(row) for row in exemplar.examples} == {len(exemplar.images)}
    mask = exemplar.examples[0][[*exemplar.images].index("mask")]
    assert set(mask.convert("L").tobytes()) == {0, 255}  # white where to paint


def test_superres_takes_any_size():
    session = zoo_session("superres")
    made = session.run({"reference": Image.new("RGB", (81, 33), "teal")}, 0, {"steps": 1})
    assert made.seen.size == (64, 26)
    assert made.generated.size == (256, 104)


def test_missing_picture_is_named(exemplar, images, tmp_path):
    given = pictures(images) | {"mask": None}
    with pytest.raises(ValueError, match="give a picture for: Mask"):
        app.answer(exemplar, given, 0, {}, tmp_path)
    assert not any(tmp_path.iterdir())


def test_fields_of_a_saved_pipeline(inpaint, images, tmp_path):
    folder, adapter = inpaint
    words = (
        folder,
        "--ip-adapter",
        adapter,
        "--ip-adapter-subfolder",
        "models",
        "--time-groups",
        "2",
        "--size",
        "64x64",
    )
    session = pipeline_session(parsed(*words))
    assert session.images == {"reference": True, "image": True, "mask": True}
    assert set(session.values) == {"prompt", "negative_prompt", "steps", "guidance_scale"}
    assert session.values["steps"] == 50
    assert session.values["guidance_scale"] == 7.5
    values = {**session.values, "steps": 2, "prompt": "a shirt"}
    found = app.answer(session, pictures(images), 0, values, tmp_path)
    assert found.generated.size == (64, 64)
    assert "1 run of 2 steps" in found.said
    with pytest.raises(ValueError, match="Image to paint in"):
        app.answer(session, {"reference": pictures(images)["reference"]}, 0, values, tmp_path)


def test_pipeline_without_an_adapter_is_refused(inpaint):
    with pytest.raises(UserError, match="--ip-adapter"):
        pipeline_session(parsed(inpaint[0]))


def test_without_gradio(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["app"]) == 2
    assert 'pip install "i2am[app]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["folder", "--zoo", "exemplar"], "one of them"),
        (["--ip-adapter", "x", "--lora", "y"], "--ip-adapter and --lora: of no use without PIPELINE"),
        (["--zoo", "tryon"], "invalid choice"),
    ],
)
def test_contradictions(words, what, monkeypatch, capsys):
    monkeypatch.setattr(app, "import_gradio", lambda: None)
    assert main(["app", *words]) == 2
    assert what in capsys.readouterr().err


def test_page_is_built(exemplar):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "i2am[app]"')
    page = app.build(exemplar)
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Reference", "Mask: white where to paint", "Denoising steps", "Seed", "Generated"} <= labels
