"""The options of loading, each really run on a saved pipeline: what they change, and that a folder knows them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from i2am import cli
from i2am.cli.arguments import USAGE
from i2am.cli.job import Job
from tests.evaluate.test_evaluate import SCORES, arguments, results

pytest_plugins = ("tests.helpers.saved_pipelines",)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def manifest(images, tmp_path):
    path = images / f"{tmp_path.name}.csv"
    path.write_text("id,reference,image,mask\na,reference.png,image.png,mask.png\n")
    return path


@pytest.fixture(scope="module")
def plain(inpaint, images, tmp_path_factory):
    """The scores of one sample, without further options."""
    path, out = images / "plain.csv", tmp_path_factory.mktemp("plain") / "out"
    path.write_text("id,reference,image,mask\na,reference.png,image.png,mask.png\n")
    return scores(inpaint, path, out)


def scores(inpaint, manifest, out, *options):
    """Scores of the one sample."""
    assert cli.main(arguments(inpaint, manifest, out, *options)) == 0
    row = results(out)["a"]
    assert row["status"] == "ok"
    return [float(row[name]) for name in SCORES if row[name]]


def save_lora(folder, seed, unet):
    """Write a LoRA of a UNet's attention, as diffusers does."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers

    torch.manual_seed(seed)
    model = UNet2DConditionModel.from_pretrained(unet)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=["to_q", "to_k"], init_lora_weights=False)
    model.add_adapter(config)
    state = convert_state_dict_to_diffusers(peft.utils.get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


def test_lora(inpaint, manifest, plain, tmp_path, capsys):
    one, other = (save_lora(tmp_path / str(seed), seed, inpaint[0] / "unet") for seed in (1, 2))
    out = tmp_path / "out"
    found = scores(inpaint, manifest, out, "--lora", one)
    assert found != pytest.approx(plain, abs=1e-3)
    assert scores(inpaint, manifest, tmp_path / "other", "--lora", other) != pytest.approx(found, abs=1e-3)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(one, tmp_path / "elsewhere")
    assert scores(inpaint, manifest, out, "--lora", moved) == found  # by what is in it, not where
    assert "pytorch_lora_weights" in json.dumps(json.loads((out / "i2am.json").read_text())["weights"]["lora"])
    for options in (["--lora", str(other)], []):
        assert cli.main(arguments(inpaint, manifest, out, *options)) == USAGE
        assert "weights of the lora" in capsys.readouterr().err


def test_offload_changes_nothing(inpaint, manifest, plain, tmp_path, capsys, monkeypatch):
    """A CPU has nothing to keep weights off, and says so; the hooks, made to run all the same, leave the scores be."""
    for how in ("model", "sequential"):
        assert cli.main(arguments(inpaint, manifest, tmp_path / "out", "--offload", how)) == USAGE
        assert "--offload" in capsys.readouterr().err
    load, hooked = Job.load, []

    def offloaded(self):
        self.args.offload = "model"
        load(self)
        hooked.append(hasattr(self.pipe.unet, "_hf_hook"))

    monkeypatch.setattr(Job, "load", offloaded)
    assert scores(inpaint, manifest, tmp_path / "out", "--device", "cpu") == pytest.approx(plain, abs=1e-5)
    assert hooked == [True]


def test_dtype(inpaint, manifest, plain, tmp_path, capsys):
    out = tmp_path / "out"
    found = scores(inpaint, manifest, out, "--dtype", "bfloat16")
    assert found == pytest.approx(plain, abs=0.6)  # random weights: rounding moves a map a good deal
    assert found != plain
    assert json.loads((out / "i2am.json").read_text())["dtype"] == "bfloat16"
    assert cli.main(arguments(inpaint, manifest, out, "--dtype", "float32")) == USAGE
    assert "dtype: 'bfloat16', now 'float32'" in capsys.readouterr().err


def test_variant(inpaint, manifest, plain, tmp_path, capsys):
    from diffusers import StableDiffusionInpaintPipeline

    folder = tmp_path / "fp16"
    StableDiffusionInpaintPipeline.from_pretrained(inpaint[0]).save_pretrained(folder, variant="fp16")
    assert list(folder.rglob("*.fp16.safetensors"))
    given = folder, inpaint[1]
    assert scores(given, manifest, tmp_path / "out", "--variant", "fp16") == pytest.approx(plain, abs=1e-5)
    assert cli.main(arguments(given, manifest, tmp_path / "other")) == USAGE
    assert "does not load" in capsys.readouterr().err
    assert cli.main(arguments(given, manifest, tmp_path / "other", "--variant", "bf16")) == USAGE


@pytest.mark.slow
def test_revision(inpaint, manifest, plain, tmp_path):
    """A repository of the hub, as its cache holds it: two revisions with different weights."""
    from diffusers import StableDiffusionInpaintPipeline

    hub = tmp_path / "hub" / "models--makers--tiny"
    pipe = StableDiffusionInpaintPipeline.from_pretrained(inpaint[0])
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        pipe.save_pretrained(hub / "snapshots" / commit)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(commit)
        for weight in pipe.unet.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(out, *options):
        words = arguments(("makers/tiny", inpaint[1]), manifest, out, *options)
        command = [sys.executable, "-m", "i2am", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, error = run(tmp_path / "main")
    assert code == 0, error
    assert [float(results(tmp_path / "main")["a"][n]) for n in SCORES[:1]] == pytest.approx(plain[:1], abs=1e-5)
    code, error = run(tmp_path / "v2", "--revision", "v2")
    assert code == 0, error
    assert float(results(tmp_path / "v2")["a"]["imacs_r2g"]) != pytest.approx(plain[0], abs=1e-4)
    assert json.loads((tmp_path / "v2" / "i2am.json").read_text())["weights"]["pipeline"] == {"commit": ["", "b" * 40]}
    code, error = run(tmp_path / "main", "--revision", "v2")  # another commit in the same folder
    assert code == USAGE
    assert "weights of the pipeline" in error or "revision" in error
    code, error = run(tmp_path / "none", "--revision", "v3")
    assert code == USAGE
    assert "within reach" in error


def test_what_needs_no_sample_needs_no_diffusers(inpaint, manifest, tmp_path, capsys, monkeypatch):
    """Tables of a finished folder, other weights, other pictures, a pipeline that is not there: torch is enough."""
    out, picture = tmp_path / "out", manifest.parent / "reference.png"
    words = arguments(inpaint, manifest, out)
    assert cli.main(words) == 0
    (out / "results.csv").unlink()
    code = "import sys; from i2am.cli import main; code = main(sys.argv[1:]); heavy = {'diffusers', 'transformers'}; "
    code += "print(code, sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.stdout.endswith("0 []\n"), done
    assert "1 of 1 samples" in done.stdout
    assert results(out)["a"]["status"] == "ok"

    def looked_at(*_):
        raise AssertionError("the pipeline's class was imported")

    monkeypatch.setattr(Job, "of", looked_at)
    assert cli.main(words) == 0
    before = picture.stat()
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert cli.main(words) == 0  # another time alone: the contents are the same
    whole = picture.read_bytes()
    picture.write_bytes(whole + b"more")
    try:
        assert cli.main(words) == USAGE
        assert "other pictures (a: " in capsys.readouterr().err
    finally:
        picture.write_bytes(whole)
    moved = shutil.copytree(inpaint[0], tmp_path / "retrained")
    assert cli.main(arguments((moved, inpaint[1]), manifest, out)) == 0  # by what is in it, not where
    with open(moved / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    assert cli.main(arguments((moved, inpaint[1]), manifest, out)) == USAGE
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(arguments(inpaint, manifest, out, "--offload", "model")) == USAGE  # of no use on cpu
    assert "--offload" in capsys.readouterr().err
    assert cli.main(arguments(inpaint, manifest, out, "--steps", "3")) == USAGE
    assert "steps: 2, now 3" in capsys.readouterr().err
    assert results(out)["a"]["status"] == "ok"
