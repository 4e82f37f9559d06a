"""The commands on pipelines that make videos, and on pipelines whose parts lie elsewhere."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import i2am
from i2am import cli
from i2am.cli import results
from tests.cli.test_cli import G2R_FILES, OTHER_FILES, R2G_FILES, check_error
from tests.evaluate.test_evaluate import results as results_of

pytest_plugins = ("tests.helpers.saved_pipelines", "tests.helpers.saved_videos")
pytestmark = pytest.mark.usefixtures("one_thread")
FILM = {"generated.webp", "ulam_r2g.webp"}


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(results, "DPI", 40)


def trace(pipeline, images, out, *options):
    argv = ["trace", pipeline, "--reference", images / "reference.png", "--steps", 2, "--out", out, "--device", "cpu"]
    return cli.main([str(word) for word in [*argv, *options]])


def film_of(path):
    """Number of frames, and size."""
    with Image.open(path) as film:
        return film.n_frames, film.size


# name: options, files, latent frames, pictures
VIDEOS = {
    "svd": (["--frames", 3, "--size", "32x24"], R2G_FILES, 3, 3),
    "wan": (["--frames", 9, "--size", "32x48", "--prompt", "a cup"], R2G_FILES | G2R_FILES, 3, 9),
    "ltx": (["--frames", 9, "--size", "32x32", "--prompt", "a cup"], R2G_FILES | G2R_FILES, 2, 9),
}


@pytest.fixture
def plain_text(monkeypatch):
    """A stand-in for ftfy, which Wan mends its prompts with."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)


@pytest.mark.parametrize("name", ["ltx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("svd", "wan"))])
def test_videos(name, saved_video, images, tmp_path, plain_text):
    """Figures are of the frame in the middle; the film's maps move over all frames."""
    options, files, frames, pictures = VIDEOS[name]
    assert trace(saved_video(name), images, tmp_path, *options, "--report") == 0
    assert {p.name for p in tmp_path.iterdir()} == files | OTHER_FILES | FILM | {"report.html"}
    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert maps.frames == frames
    height, width = (int(n) for n in options[3].split("x"))
    assert film_of(tmp_path / "generated.webp") == (pictures, (width, height))
    assert film_of(tmp_path / "ulam_r2g.webp")[0] == frames
    with Image.open(tmp_path / "generated.png") as middle:
        assert middle.size == (width, height)
    header = (tmp_path / "report.html").read_text(encoding="utf-8").split('id="header">')[1].split("</script>")[0]
    assert len(json.loads(header)["frames"]) == frames
    told = json.loads((tmp_path / "i2am.json").read_text())
    assert told["frames"] == int(options[1])
    assert set(told["files"]) >= FILM


def test_the_given_frame_of_a_video_is_not_among_the_maps_frames(saved_video, images, tmp_path):
    """LTX's first latent frame is given: pictures 5 and 9 of nine are those of the other two."""
    assert trace(saved_video("ltx"), images, tmp_path, *VIDEOS["ltx"][0]) == 0
    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert maps.pictures(list(range(9))) == [4, 8]
    assert maps.pictures(["a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="8 pictures are no video of 3 latent frames, 1 of which are given"):
        maps.pictures(list(range(8)))


def test_a_package_that_a_pipeline_misses(saved_video, images, tmp_path, capsys, monkeypatch):
    from diffusers.pipelines.wan import pipeline_wan_i2v

    def fix_text(text):
        raise NameError("name 'nosuchpackage' is not defined", name="nosuchpackage")

    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=fix_text), raising=False)
    check_error(capsys, trace(saved_video("wan"), images, tmp_path, *VIDEOS["wan"][0]), "needs the package nosuch")


def test_a_later_run_of_a_picture_leaves_no_film(saved_video, paint_by_example, images, tmp_path):
    assert trace(saved_video("svd"), images, tmp_path, *VIDEOS["svd"][0]) == 0
    inputs = ["--image", images / "image.png", "--mask", images / "mask.png"]
    assert trace(paint_by_example, images, tmp_path, *inputs) == 0
    assert not list(tmp_path.glob("*.webp"))


def test_evaluate_videos(saved_video, images, tmp_path):
    manifest, out = images / "videos.jsonl", tmp_path / "out"
    rows = [{"id": "a", "reference": "reference.png"}, {"id": "b", "reference": "reference.png", "mask": "mask.png"}]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    options = ["--frames", 9, "--size", "32x32", "--steps", 2, "--device", "cpu", "--save-images", "--save-maps"]
    argv = ["evaluate", manifest, "--pipeline", saved_video("ltx"), "--out", out, *options]
    assert cli.main([str(word) for word in argv]) == 1
    records = [json.loads(line) for file in (out / "samples").iterdir() for line in file.read_text().splitlines()]
    told = {record["id"]: record for record in records if "id" in record}
    assert told["a"]["status"] == "ok"
    assert "scores a picture" in told["b"]["error"]
    assert film_of(next((out / "images").iterdir()))[0] == 9
    maps = i2am.AttributionMaps.load(next((out / "maps").iterdir()))
    assert maps.frames == 2
    levels, _ = i2am.evaluate.thumbnails.read_levels(next((out / "levels").iterdir()))
    assert levels["r2g.ulam"].shape == (1, 8, 8)


# --------------------------------------------------------------------------------------------- parts from elsewhere


@pytest.fixture(scope="module")
def motion_adapter(tmp_path_factory):
    from diffusers import MotionAdapter

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("motion")
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        use_motion_mid_block=False,
    )
    adapter.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_to_image(inpaint, tmp_path_factory):
    """The pipeline of the fixture ``inpaint`` with a UNet of four channels."""
    import diffusers

    from tests.helpers.tiny_models.small import tiny_unet

    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(inpaint[0])
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    parts = {**pipe.components, "unet": tiny_unet(in_channels=4)}
    diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def test_animatediff_from_a_pipeline_a_motion_adapter_and_an_ip_adapter(
    text_to_image, inpaint, motion_adapter, images, tmp_path
):
    options = ["--pipeline-class", "AnimateDiffPipeline", "--part", f"motion_adapter={motion_adapter}"]
    options += ["--ip-adapter", inpaint[1], "--ip-adapter-subfolder", "models", "--frames", 2, "--size", "64x64"]
    assert trace(text_to_image, images, tmp_path, *options) == 0
    files = R2G_FILES | G2R_FILES | OTHER_FILES | FILM | {"ulam_g2r.webp"}
    assert {p.name for p in tmp_path.iterdir()} == files
    maps = i2am.AttributionMaps.load(tmp_path / "maps.safetensors")
    assert (maps.frames, maps.batch) == (2, 2)


@pytest.mark.slow
def test_controlnet_from_elsewhere(text_to_image, inpaint, images, tmp_path, capsys):
    """Its weights count among those of an evaluation; other weights, another result."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(text_to_image / "unet")
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet)
        for layer in net.controlnet_down_blocks:  # begin at zero
            torch.nn.init.normal_(layer.weight)
        net.save_pretrained(tmp_path / str(seed) / "controlnet")  # as a pipeline's folder holds it
    manifest = images / "control.csv"
    manifest.write_text("id,reference,control_image,mask\na,reference.png,image.png,mask.png\n")

    def argv(seed, out):
        options = ["--pipeline-class", "StableDiffusionControlNetPipeline", "--part", f"controlnet={tmp_path / seed}"]
        options += ["--ip-adapter", inpaint[1], "--ip-adapter-subfolder", "models", "--steps", 1, "--size", "64x64"]
        return [str(x) for x in ["evaluate", manifest, "--pipeline", text_to_image, "--out", out, *options]]

    def scores(seed, out):
        assert cli.main(argv(seed, out)) == 0
        return results_of(out)["a"]["imacs_r2g"]

    first = scores("0", tmp_path / "first")
    assert scores("1", tmp_path / "second") != first
    capsys.readouterr()
    assert cli.main(argv("1", tmp_path / "first")) == 2
    assert "weights of the part controlnet" in capsys.readouterr().err


def test_parts_that_are_not_there(text_to_image, motion_adapter, images, tmp_path, capsys):
    def fails(*options):
        return trace(text_to_image, images, tmp_path / "out", *options)

    check_error(capsys, fails("--part", "nonsense"), "--part", "controlnet=DIR")
    check_error(capsys, fails("--part", f"motor={motion_adapter}"), "has no motor", "unet")
    check_error(capsys, fails("--part", f"unet={tmp_path / 'no' / 'where'}"), "there is no folder")
    check_error(capsys, fails("--part", f"unet={images}"), "holds no unet")
    check_error(capsys, fails("--pipeline-class", "FancyPipeline"), "--pipeline-class", "FancyPipeline")
    twice = ["--part", f"unet={text_to_image}", "--part", f"unet={text_to_image}"]
    check_error(capsys, fails(*twice), "given twice")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("LTX2ConditionPipeline", "takes its reference as conditions"),
        ("AnyFlowPipeline", "takes its reference as video"),
        ("WanAnimatePipeline", "needs pose_video and face_video"),
        ("AnimateDiffVideoToVideoPipeline", "needs video"),
    ],
)
def test_videos_that_need_more_than_a_picture(kind, words):
    import inspect

    import diffusers

    from i2am.cli.arguments import UserError
    from i2am.cli.pipelines import route
    from tests.cli.test_cli import options

    pipeline = getattr(diffusers, kind)
    given = {"ip_adapter": "given"} if "AnimateDiff" in kind else {}
    with pytest.raises(UserError, match=words):
        route(pipeline, set(inspect.signature(pipeline.__call__).parameters), options(**given))
