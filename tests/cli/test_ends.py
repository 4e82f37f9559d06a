"""How the command ends: exit codes, signals, closed pipes, full devices, and folders that hold odd files."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from i2am import cli
from i2am.cli import results
from i2am.cli import trace as trace_command
from i2am.cli.arguments import SOME_FAILED, STOPPED, USAGE
from i2am.cli.job import Job
from i2am.cli.pipelines import find_class
from i2am.cli.streams import Terminated, no_interrupt, stopping_signals
from tests.cli.test_cli import check_error, trace

pytest_plugins = ("tests.helpers.saved_pipelines",)
pytestmark = pytest.mark.usefixtures("one_thread")

COMMAND = [sys.executable, "-m", "i2am"]


@pytest.mark.parametrize("words", [["--help"], ["trace", "--help"], ["completion", "bash"]])
def test_a_full_device_and_a_closed_pipe(words):
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (STOPPED, 1)
        assert "No space left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("closed", "words", "code"), [("1", "--version", 0), ("0 1 2", "--version", 0), ("2", "trace", 2), ("1 2", "x", 2)]
)
def test_streams_that_were_closed_before_the_start(closed, words, code):
    """As daemons leave them: no traceback, no exit code of another meaning, no complaint among the output."""
    shut = " ".join(f"{number}>&-" for number in closed.split())
    line = f'exec "{sys.executable}" -m i2am {words} {shut}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr


def test_sigterm_is_taken_as_ctrl_c_is():
    with stopping_signals():
        with pytest.raises(Terminated, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with pytest.raises(Terminated):
            with no_interrupt():
                os.kill(os.getpid(), signal.SIGTERM)
                held = True
        assert held
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_process_ended_by_sigterm_says_so():
    code = "import i2am.cli as c; c.demo.run = lambda a: (print('on', flush=True), __import__('time').sleep(60)); "
    code += "import sys; sys.exit(c.main(['demo']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (STOPPED, "i2am: interrupted by SIGTERM; what is finished is kept\n")


def test_completion_knows_every_option(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("evaluate", "guidance-scale", "restart"):
            assert word in script
        if shell == "bash":
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["trace", "P", "--dtype", "fl"], ["float32", "float16"]),
        (["trace", "P", "--device", ""], ["cpu", "cuda", "mps"]),
        (["app", "--zoo", "ex"], ["exemplar"]),
        (["completion", "f"], ["fish"]),
        (["evaluate", "--time"], ["--time-groups"]),
        (["trace", "--out", ""], []),  # a file
    ],
)
def test_completion_of_values(line, offered, capsys):
    assert cli.main(["completion", "bash"]) == 0
    words = " ".join(f"'{word}'" for word in ["i2am", *line])
    script = capsys.readouterr().out + f"COMP_WORDS=({words}); COMP_CWORD={len(line)}; _i2am; echo ${{COMPREPLY[@]}}"
    told = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True)
    assert (told.stdout.split(), told.stderr) == (offered, "")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "_class_name"),
        ('{"_class_name": ["a"]}', "_class_name"),
        ('{"_class_name": "UNet2DConditionModel"}', "no pipeline"),
        ('{"_class_name": "utils"}', "no pipeline"),
        ("[" * 100_000, "not a saved diffusers pipeline"),
        ("\x00\xff", "not a saved diffusers pipeline"),
    ],
)
def test_an_odd_model_index(tmp_path, text, word):
    (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(cli.UserError, match=word):
        find_class(str(tmp_path))


def test_names_that_no_file_can_have(images, tmp_path, capsys):
    check_error(capsys, trace("x" * 5000 + "/y/z", images, tmp_path / "out"), "PIPELINE")
    check_error(capsys, trace(tmp_path, images, tmp_path / "out", "--reference", "x" * 5000 + ".png"), "--reference")
    check_error(capsys, trace(tmp_path, images, tmp_path / ("x" * 300)), "")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--guidance-scale", "nan"), ("--ip-adapter-scale", "inf"), ("--record-limit", "lots"), ("--steps", "9" * 5000)],
)
def test_values_are_refused_before_anything_is_read(monkeypatch, images, tmp_path, capsys, option, value):
    monkeypatch.setattr(Job, "of", lambda *_: pytest.fail("too late"))
    check_error(capsys, trace("nowhere", images, tmp_path, option, value), option)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_words_end_with_a_code(words):
    for command in ("trace", "evaluate", "compare", "completion"):
        assert cli.main([command, "--debug=x", *words]) == USAGE  # --debug takes no value: nothing is ever run


# --------------------------------------------------------------------------------------------- nothing of a run is lost


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_whatever_goes_wrong_the_earlier_run_is_whole(paint_by_example, images, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setattr(results, "_drawings", lambda *_: iter(()))
    assert trace(paint_by_example, images, tmp_path / "out") == 0
    before, calls = files_of(tmp_path / "out"), []

    def failing(self, file, *args, **kwargs):
        calls.append(file)
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", failing)
    code = trace(paint_by_example, images, tmp_path / "out", "--seed", 5)
    assert (code, bool(calls)) == (4 if isinstance(error, RuntimeError) else STOPPED, True)
    assert files_of(tmp_path / "out") == before


def test_maps_that_are_not_finite_are_kept_beside_a_good_run(paint_by_example, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "_drawings", lambda *_: iter(()))
    assert trace(paint_by_example, images, tmp_path / "out") == 0
    before, original, named = files_of(tmp_path / "out"), trace_command._traced, []

    def overflowed(*args):
        outcome = original(*args)
        first, second = outcome.maps._sums[:2]  # two steps in five time groups: 0 and 2
        first.r2g[2:] = float("nan")
        second.r2g.fill_(float("nan"))
        named.append(second.layer)
        return outcome

    monkeypatch.setattr(trace_command, "_traced", overflowed)
    assert trace(paint_by_example, images, tmp_path / "out") == SOME_FAILED
    assert f"2 layers hold values that are not finite, first {named[0]} in step 1 of 2" in capsys.readouterr().err
    failed = tmp_path / "out" / "failed"
    assert {p.name for p in failed.iterdir()} == {"maps.safetensors", "generated.png", "reference.png", "i2am.json"}
    assert files_of(tmp_path / "out") == before
    assert trace(paint_by_example, images, tmp_path / "fresh") == SOME_FAILED
    assert (tmp_path / "fresh" / "maps.safetensors").exists()


def test_ulam_pictures_show_their_own_direction_on_their_own_image(tmp_path, monkeypatch):
    """ulam_g2r.png is G2R on the reference, ulam_r2g.png R2G on the generated image; so with every level."""
    import torch

    from i2am import plot
    from i2am.maps import AttributionMaps, LayerSums

    sums = dict(grid=(4, 4), reference_grid=(4, 4), skip=0, keys=16, default=True, counts=(1,))
    r2g, g2r = torch.rand(1, 1, 2, 16), torch.rand(1, 1, 2, 16)
    maps = AttributionMaps([LayerSums(layer="a", reference="r", **sums, r2g=r2g, g2r=g2r)])
    generated, reference = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    seen = {}

    def overlay(image, values, **_):
        seen["ulam", image.getpixel((0, 0))] = values
        return type("Axes", (), {"figure": None})()

    def levels(maps, direction, image, level, **_):
        seen[level, direction] = image.getpixel((0, 0))

    monkeypatch.setattr(plot, "overlay", overlay)
    monkeypatch.setattr(plot, "levels", levels)
    directions = {"r2g": generated, "g2r": reference}
    for name, draw in results._drawings(maps, generated, reference, directions, None, maps.references[0]):
        if name != "summary":
            draw()
    red, blue = (255, 0, 0), (0, 0, 255)
    torch.testing.assert_close(seen["ulam", red], maps.ulam("r2g"))
    torch.testing.assert_close(seen["ulam", blue], maps.ulam("g2r"))
    for level in ("time", "head", "layer"):
        assert (seen[level, "r2g"], seen[level, "g2r"]) == (red, blue)


def test_deep_pictures_reach_the_pipeline_scaled(tmp_path):
    from i2am.cli.images import open_image

    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_image("x", tmp_path / "deep.png", "RGB"))[..., 0], grey)
    Image.fromarray((grey > 100).astype(np.uint8)).save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(open_image("x", tmp_path / "mask.png", "L")), (grey > 100) * 255)
    Image.fromarray(grey // 4).save(tmp_path / "labels.png")
    with pytest.raises(cli.UserError, match=r"labels\.png.*63 of 255"):
        open_image("--mask", tmp_path / "labels.png", "L")
