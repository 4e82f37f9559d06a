"""The ``i2am`` command: what it writes, and how it ends when the input is wrong."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import i2am
from i2am import cli
from i2am.cli import images as cli_images
from i2am.cli import pipelines, results
from i2am.cli import trace as trace_command
from i2am.cli.arguments import INTERNAL, STOPPED, UserError
from i2am.cli.job import Job
from tests.helpers import older_versions
from tests.helpers.tiny_models.small import build_paint_by_example, feature_extractor

pytest_plugins = ("tests.helpers.saved_pipelines",)  # the fixtures paint_by_example, inpaint and images

R2G_FILES = {"ulam_r2g.png", "tlam_r2g.png", "hlam_r2g.png", "llam_r2g.png"}
G2R_FILES = {"ulam_g2r.png", "tlam_g2r.png", "hlam_g2r.png", "llam_g2r.png"}
OTHER_FILES = {"generated.png", "reference.png", "summary.png", "maps.safetensors", "i2am.json"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(results, "DPI", 40)  # test_plot looks at figures, these tests at which are written


def trace(pipeline, images, out, *options, image=True):
    inputs = ["--image", images / "image.png", "--mask", images / "mask.png"] if image else []
    reference = [] if "--reference" in options else ["--reference", images / "reference.png"]
    argv = ["trace", pipeline, *reference, *inputs, "--steps", 2, "--out", out, "--device", "cpu", *options]
    return cli.main([str(word) for word in argv])


def check_error(capsys, code, *words):
    """Exit code 2 and one line on stderr with all ``words``."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("i2am: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])
    for word in words:
        assert str(word) in lines[0]


# ------------------------------------------------------------------------------------------------------ end to end


def test_paint_by_example_has_r2g_only(paint_by_example, images, tmp_path, capsys):
    assert trace(paint_by_example, images, tmp_path) == 0
    assert {p.name for p in tmp_path.iterdir()} == R2G_FILES | OTHER_FILES
    printed = capsys.readouterr().out
    assert "no G2R" in printed
    assert "one token" in printed
    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert set(maps.grids().values()) == {(4, 5)}  # 64×72 pixels, halved four times and rounded up
    assert Image.open(tmp_path / "generated.png").size == (72, 64)


def test_ip_adapter_inpainting_has_both_directions(inpaint, images, tmp_path, capsys):
    pipeline, adapter = inpaint
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--prompt", "a cup", "--size", "64x72"]
    assert trace(pipeline, images, tmp_path, *options, "--time-groups", 3, "--layers", "up_blocks.*") == 0
    assert {p.name for p in tmp_path.iterdir()} == R2G_FILES | G2R_FILES | OTHER_FILES
    assert "no G2R" not in capsys.readouterr().out
    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert maps.layers
    assert all(name.startswith("up_blocks.") for name in maps.layers)
    assert maps.tlam("r2g").shape == (1, 3, 4, 5)
    assert maps.ulam("g2r").shape == (1, 4, 4)
    assert Image.open(tmp_path / "generated.png").size == (72, 64)
    assert Image.open(tmp_path / "reference.png").size == (40, 40)  # CLIP sees the central square
    settings = json.loads((tmp_path / "i2am.json").read_text())
    assert settings["prompt"] == "a cup"
    assert settings["pipeline_class"] == "StableDiffusionInpaintPipeline"
    assert settings["versions"]["torch"] == torch.__version__
    assert set(settings["files"]) | {"i2am.json"} == R2G_FILES | G2R_FILES | OTHER_FILES


def test_words_of_the_prompt(inpaint, paint_by_example, images, tmp_path, capsys):
    pipeline, adapter = inpaint
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--prompt", "a red cat"]
    assert trace(pipeline, images, tmp_path / "out", *options, "--word", "red", "--word", "cat") == 0
    assert {"words.png", "budget.png"} <= {p.name for p in (tmp_path / "out").iterdir()}
    maps = i2am.AttributionMaps.load(tmp_path / "out" / "maps.safetensors")
    assert (maps.references, maps.words) == (["ip_adapter"], ["red", "cat"])
    assert json.loads((tmp_path / "out" / "i2am.json").read_text())["word"] == ["red", "cat"]
    capsys.readouterr()
    check_error(
        capsys,
        trace(pipeline, images, tmp_path / "x", *options, "--word", "dog"),
        "'dog' is no word of the prompt",
        "cat",
    )
    check_error(capsys, trace(paint_by_example, images, tmp_path / "y", "--word", "dog"), "takes no --word")


def test_several_references(inpaint, paint_by_example, images, tmp_path, capsys):
    """An adapter's images in one softmax: a set of files of each, numbered; another run takes these away."""
    pipeline, adapter = inpaint
    second = tmp_path / "second.png"
    Image.new("RGB", (40, 40), "green").save(second)
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models"]
    several = ["--reference", images / "reference.png", "--reference", second, "--report"]
    out = tmp_path / "out"
    assert trace(pipeline, images, out, *options, *several) == 0
    names = {p.name for p in out.iterdir()}
    for number in "12":
        stems = ("reference", "summary", "ulam_r2g", "tlam_r2g", "hlam_r2g", "llam_r2g", "ulam_g2r")
        assert {f"{stem}_{number}.png" for stem in stems} <= names
        assert f"report_{number}.html" in names
    assert not {"summary.png", "report.html", "reference.png"} & names
    told = json.loads((out / "i2am.json").read_text())
    assert told["reference_name"] == ["ip_adapter.image_0", "ip_adapter.image_1"]
    assert told["reference"] == [str(images / "reference.png"), str(second)]
    with Image.open(out / "reference_2.png") as seen:
        assert seen.convert("RGB").getpixel((5, 5)) == (0, 128, 0)
    mask = ["--reference-mask", images / "mask.png"]
    capsys.readouterr()
    check_error(capsys, trace(pipeline, images, out, *options, *several, *mask), "is of one reference")
    pair = ["--reference", images / "reference.png", "--reference", second]
    check_error(capsys, trace(paint_by_example, images, tmp_path / "x", *pair), "takes one --reference")
    assert trace(pipeline, images, out, *options) == 0
    assert not [p.name for p in out.iterdir() if "_2." in p.name]


def test_report(inpaint, images, tmp_path):
    """Both masks reach it, cut to what the encoder sees; the maps beside it stay small: without queries and keys."""
    pipeline, adapter = inpaint
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--report", "--prompt", "a <cup>"]
    left = Image.new("L", (60, 40))
    left.paste(255, (0, 0, 30, 40))
    left.save(tmp_path / "left.png")
    assert trace(pipeline, images, tmp_path / "out", *options, "--reference-mask", tmp_path / "left.png") == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    header = json.loads(re.search(r'id="header">(.*?)</script>', text, re.S)[1])
    assert header["frames"][0]["rows"]["generated"]["cells"] == [4, 4]  # of 64×72 pixels
    assert {name for name, *_ in header["scores"]} == {"IMACS of R2G", "IMACS of G2R", "Box IoU"}
    right_edge = max(float(x) for x in re.findall(r"([\d.]+) [\d.]+", header["outlines"]["reference"]))
    assert right_edge == pytest.approx(0.5, abs=0.05)  # columns 10 to 30 of 10 to 50
    assert "a &lt;cup&gt;" in text
    assert not i2am.AttributionMaps.load(tmp_path / "out" / "maps.safetensors").recorded
    assert trace(pipeline, images, tmp_path / "out", *options[:-3], "--prompt", "x") == 0
    assert not (tmp_path / "out" / "report.html").exists()


def test_report_options_are_checked(inpaint, images, tmp_path, capsys):
    pipeline, adapter = inpaint
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models"]
    code = trace(pipeline, images, tmp_path, *options, "--reference-mask", images / "mask.png")
    check_error(capsys, code, "--reference-mask", "--report")
    code = trace(pipeline, images, tmp_path, *options, "--report", "--record-limit", "1KB")
    check_error(capsys, code, "record_limit 1 KB", "These fit")


def test_paint_by_example_as_published(paint_by_example, images, tmp_path):
    """Checkpoints from before diffusers retired the pipeline name its package as the encoder's library."""
    shutil.copytree(paint_by_example, tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    index["image_encoder"][0] = "paint_by_example"
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert trace(tmp_path / "pipe", images, tmp_path / "out") == 0


def test_reference_and_seed_reach_the_run(inpaint, images, tmp_path, monkeypatch):
    pipeline, adapter = inpaint
    written = []
    monkeypatch.setattr(
        trace_command, "write_results", lambda out, maps, generated, *_, **__: written.append((maps, generated))
    )

    def run(*more):
        options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", *more]
        assert trace(pipeline, images, tmp_path, *options) == 0
        maps, generated = written.pop()
        return maps.ulam("g2r"), generated.tobytes()

    first, again = run(), run()
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert run("--seed", 1)[1] != first[1]
    assert not torch.equal(run("--reference", images / "image.png")[0], first[0])


def test_a_later_run_leaves_no_picture_of_the_earlier_one(paint_by_example, inpaint, images, tmp_path):
    pipeline, adapter = inpaint
    (tmp_path / "notes.txt").write_text("mine")
    assert trace(pipeline, images, tmp_path, "--ip-adapter", adapter, "--ip-adapter-subfolder", "models") == 0
    assert (tmp_path / "ulam_g2r.png").exists()
    assert trace(paint_by_example, images, tmp_path) == 0
    assert {p.name for p in tmp_path.iterdir()} == R2G_FILES | OTHER_FILES | {"notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------- wrong input


def test_foreign_files_are_not_overwritten(paint_by_example, images, tmp_path, capsys):
    (tmp_path / "generated.png").write_text("mine")
    check_error(capsys, trace(paint_by_example, images, tmp_path), "--out", "generated.png")
    assert (tmp_path / "generated.png").read_text() == "mine"


def test_out_that_cannot_be_a_folder(paint_by_example, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check_error(capsys, trace(paint_by_example, images, tmp_path / "file"), "--out", tmp_path / "file")
    (tmp_path / "i2am.json").write_text("[]")
    check_error(capsys, trace(paint_by_example, images, tmp_path), "--out", "i2am.json")


@pytest.mark.parametrize("name", ["missing.png", "broken.png", "text.png"])
@pytest.mark.parametrize("option", ["--reference", "--mask"])
def test_unreadable_images(images, tmp_path, capsys, option, name):
    code = trace("nowhere/at-all", images, tmp_path, option, images / name)
    check_error(capsys, code, option, images / name)


def test_pipeline_that_is_not_there(images, tmp_path, capsys):
    check_error(capsys, trace(tmp_path / "nowhere", images, tmp_path / "out"), "no folder", tmp_path / "nowhere")
    check_error(capsys, trace(images, images, tmp_path / "out"), images, "model_index.json")
    assert not (tmp_path / "out").exists()


def test_pipeline_class_that_diffusers_does_not_have(images, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FancyPipeline"}')
    check_error(capsys, trace(tmp_path, images, tmp_path / "out"), "FancyPipeline")


def test_truncated_weights(paint_by_example, images, tmp_path, capsys):
    shutil.copytree(paint_by_example, tmp_path / "pipe")
    weights = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    check_error(capsys, trace(tmp_path / "pipe", images, tmp_path / "out"), "PIPELINE", "does not load")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "60x64"], ["--size", "60x64"]),
        (["--size", "64"], ["--size", "512x384"]),
        (["--steps", "0"], ["--steps", "positive"]),
        (["--time-groups", "x"], ["--time-groups", "positive"]),
        (["--seed", "-1"], ["--seed"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--dtype", "int8"], ["--dtype", "float16"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--layers", "nothing.*"], ["layers", "nothing.*", "up_blocks"]),
        (["--prompt", "a cup"], ["PaintByExamplePipeline", "--prompt"]),
        (["--ip-adapter", "some/adapter", "--ip-adapter-weight", "x.bin"], ["PaintByExamplePipeline", "--ip-adapter"]),
        (["--ip-adapter-scale", "1"], ["--ip-adapter-scale", "without --ip-adapter"]),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith("--") else "",
)
def test_option_values(paint_by_example, images, tmp_path, capsys, options, words):
    check_error(capsys, trace(paint_by_example, images, tmp_path, *options), *words)


def test_missing_inputs_are_named_before_loading(paint_by_example, inpaint, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Job, "load", lambda self: pytest.fail("weights were loaded"))
    check_error(capsys, trace(paint_by_example, images, tmp_path, image=False), "PaintByExamplePipeline", "--image")
    code = trace(paint_by_example, images, tmp_path, "--image", images / "image.png", image=False)
    check_error(capsys, code, "--mask")
    check_error(capsys, trace(inpaint[0], images, tmp_path), "StableDiffusionInpaintPipeline", "--ip-adapter")
    check_error(capsys, cli.main(["trace", str(inpaint[0]), "--out", str(tmp_path)]), "--reference")


def test_ip_adapter_that_is_not_there_or_does_not_fit(inpaint, images, tmp_path, capsys):
    pipeline, adapter = inpaint
    out = tmp_path / "out"
    check_error(capsys, trace(pipeline, images, out, "--ip-adapter", adapter / "x" / "y"), "no folder")
    check_error(capsys, trace(pipeline, images, out, "--ip-adapter", adapter), "no weight file")
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--ip-adapter-weight"]
    check_error(capsys, trace(pipeline, images, out, *options, "y.bin"), "y.bin")
    shutil.copytree(adapter, tmp_path / "adapter")
    save_file({"ip_adapter.1.weight": torch.zeros(1)}, tmp_path / "adapter" / "models" / "ip.safetensors")
    options = ["--ip-adapter", tmp_path / "adapter", "--ip-adapter-subfolder", "models"]
    check_error(capsys, trace(pipeline, images, out, *options), "ip.safetensors", "does not fit")


def test_ip_adapter_of_scale_zero_has_no_maps(inpaint, images, tmp_path, capsys):
    pipeline, adapter = inpaint
    options = ["--ip-adapter", adapter, "--ip-adapter-subfolder", "models", "--ip-adapter-scale", 0]
    check_error(capsys, trace(pipeline, images, tmp_path, *options), "nothing was recorded")


def test_a_bug_is_a_sentence_and_its_traceback_is_asked_for(paint_by_example, images, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(i2am, "trace", broken)
    assert trace(paint_by_example, images, tmp_path) == INTERNAL
    err = capsys.readouterr().err
    assert "i2am: error: internal error: TypeError: a bug" in err
    assert "Traceback" not in err
    assert trace(paint_by_example, images, tmp_path, "--debug") == INTERNAL
    assert "in broken" in capsys.readouterr().err


def test_interrupt_ends_without_a_traceback(paint_by_example, images, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(i2am, "trace", interrupted)
    assert trace(paint_by_example, images, tmp_path) == STOPPED
    assert "interrupted" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- single decisions


def options(**given):
    names = ("reference", "image", "mask", "control_image", "prompt", "negative_prompt", "guidance_scale", "steps")
    empty = dict.fromkeys((*names, "ip_adapter", "size", "frames"))
    return type("Options", (), {**empty, "reference": "r.png", **given})()


def call_of(name):
    import inspect

    import diffusers

    pipeline_class = older_versions.known(getattr(diffusers, name))
    return pipeline_class, set(inspect.signature(pipeline_class.__call__).parameters)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        (
            "PaintByExamplePipeline",
            "image mask",
            {"example_image": "reference", "image": "image", "mask_image": "mask"},
        ),
        ("StableDiffusionImageVariationPipeline", "", {"image": "reference"}),
        ("FluxKontextPipeline", "prompt", {"image": "reference", "prompt": "prompt"}),
        ("Flux2KleinPipeline", "", {"image": "reference"}),
        ("QwenImageEditPlusPipeline", "", {"image": "reference"}),
        (
            "FluxKontextInpaintPipeline",
            "image mask",
            {"image_reference": "reference", "image": "image", "mask_image": "mask"},
        ),
        ("VersatileDiffusionImageVariationPipeline", "", {"image": "reference"}),
        ("BriaFiboEditPipeline", "prompt mask", {"image": "reference", "prompt": "prompt", "mask": "mask"}),
        ("DreamLitePipeline", "prompt", {"image": "reference", "prompt": "prompt"}),
        ("DreamLiteMobilePipeline", "", {"image": "reference"}),
        ("StableDiffusionPipeline", "ip_adapter", {"ip_adapter_image": "reference"}),
        ("StableDiffusionImg2ImgPipeline", "ip_adapter image", {"ip_adapter_image": "reference", "image": "image"}),
        (
            "StableDiffusionXLInpaintPipeline",
            "ip_adapter image mask prompt",
            {"ip_adapter_image": "reference", "image": "image", "mask_image": "mask", "prompt": "prompt"},
        ),
        (
            "StableDiffusionControlNetPipeline",
            "ip_adapter control_image",
            {"ip_adapter_image": "reference", "image": "control_image"},
        ),
        (
            "StableDiffusionControlNetInpaintPipeline",
            "ip_adapter image mask control_image steps",
            {
                "ip_adapter_image": "reference",
                "image": "image",
                "mask_image": "mask",
                "control_image": "control_image",
                "num_inference_steps": "steps",
            },
        ),
    ],
)
def test_where_inputs_go(name, given, expected):
    assert pipelines.route(*call_of(name), options(**dict.fromkeys(given.split(), "given"))) == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("StableDiffusionUpscalePipeline", "image", "no reference image"),
        ("StableDiffusionPipeline", "", "give --ip-adapter"),
        ("StableDiffusionPipeline", "ip_adapter image", "takes no --image"),
        ("StableDiffusionImageVariationPipeline", "mask prompt", "no --mask and no --prompt"),
        ("StableDiffusionControlNetPipeline", "ip_adapter image", "needs --control-image"),
        ("StableDiffusionControlNetInpaintPipeline", "ip_adapter image mask", "needs --control-image"),
        ("StableDiffusionImg2ImgPipeline", "ip_adapter", "needs --image"),
    ],
)
def test_inputs_that_do_not_fit(name, given, message):
    with pytest.raises(UserError, match=message):
        pipelines.route(*call_of(name), options(**dict.fromkeys(given.split(), "given")))


def test_part_of_the_reference_that_clip_sees():
    reference = Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60).astype(np.uint8))
    pipe = type("Pipe", (), {"feature_extractor": feature_extractor()})()
    seen = cli_images.part_seen(reference, pipe, reference)
    assert seen.tobytes() == reference.crop((10, 0, 50, 40)).tobytes()
    wan = type("Pipe", (), {"image_processor": feature_extractor()})()
    assert cli_images.part_seen(reference, wan, reference).tobytes() == seen.tobytes()
    squeezed = type("StableVideoDiffusionPipeline", (), {"feature_extractor": feature_extractor()})()
    assert cli_images.part_seen(reference, squeezed, [reference]) is reference
    cut = type("I2VGenXLPipeline", (), {"feature_extractor": feature_extractor()})()
    film = [Image.new("L", (32, 32))]
    assert cli_images.part_seen(reference, cut, film).tobytes() == reference.crop((10, 0, 50, 40)).tobytes()
    pipe.feature_extractor = None
    assert cli_images.part_seen(reference, pipe, reference) is reference


def test_figures_of_a_model_with_several_head_counts(images, tmp_path):
    pipe = build_paint_by_example(
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(1, 2),
    )
    pipe.save_pretrained(tmp_path / "pipe")
    assert trace(tmp_path / "pipe", images, tmp_path / "out") == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"hlam_r2g_1_heads.png", "hlam_r2g_2_heads.png"} <= names
    assert "hlam_r2g.png" not in names


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert i2am.__version__ in capsys.readouterr().out
    assert cli.main(["trace", "--help"]) == 0
    assert "--reference" in capsys.readouterr().out
    assert cli.main([]) == 0
    assert "compare" in capsys.readouterr().out


def test_help_does_not_import_the_heavy_packages():
    code = """if True:
        import sys
        from i2am.cli import COMMANDS, main
        for words in ([], ["--help"], ["--version"], *([c, "--help"] for c in COMMANDS), ["completion", "bash"]):
            assert main(words) == 0
        heavy = {"torch", "numpy", "diffusers", "transformers", "matplotlib", "PIL", "skimage"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "i2am", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"i2am {i2am.__version__}"
