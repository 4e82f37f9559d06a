"""The zoo: tasks whose truth is true, pipelines that are diffusers', weights that look at their reference, training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am import metrics, zoo
from i2am.zoo import data, train
from i2am.zoo.encoder import PatchEncoder, centres, fourier
from i2am.zoo.flow import FlowSupervision, true_places
from i2am.zoo.pipelines import ReferenceInpaintingPipeline, build, frame_of_mask
from i2am.zoo.storage import read, save

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2
INPAINTING = ("exemplar", "tryon")


def paint(pipe, task, reference=None, **options):
    reference = task.reference if reference is None else reference
    options = dict(num_inference_steps=STEPS, output_type="pt", generator=torch.Generator().manual_seed(0)) | options
    if isinstance(pipe, zoo.SuperResolutionPipeline):
        return pipe(reference, **options).images * 2 - 1
    return pipe(task.picture, task.mask, reference, task.pose, **options).images * 2 - 1


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", zoo.NAMES)
def test_tasks_are_the_same_for_the_same_seed(name):
    first, again, other = (zoo.samples(name, 2, seed=s) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    assert not torch.equal(first.picture, other.picture)


@pytest.mark.parametrize("name", INPAINTING)
def test_the_true_source_is_where_the_colours_come_from(name):
    task = zoo.samples(name, 6, seed=3)
    known = ~task.source.isnan().any(-1)
    assert torch.equal(known, task.object[:, 0] > 0.5)
    moved = data.look_up(task.reference, task.source.nan_to_num(0))
    inner = torch.nn.functional.max_pool2d(1 - task.object, 7, 1, 3) == 0  # edges of objects are soft
    error = ((moved - task.picture).abs() * inner).sum() / (3 * inner.sum())
    assert error < 0.02
    wrong = data.look_up(task.reference, task.source.nan_to_num(0) + 3)
    assert ((wrong - task.picture).abs() * inner).sum() / (3 * inner.sum()) > 4 * error


@pytest.mark.parametrize("name", INPAINTING)
def test_masks_contain_the_object_and_no_more_than_a_margin(name):
    task = zoo.samples(name, 4)
    assert (task.object <= task.mask).all()
    grown = torch.nn.functional.max_pool2d(task.object, 2 * data.MARGIN[name] + 1, 1, data.MARGIN[name])
    assert torch.equal(task.mask, grown)
    assert (task.scene * task.mask == 0).all()
    assert torch.equal(task.scene * (1 - task.mask), task.picture * (1 - task.mask))


def test_superres_truth():
    task = zoo.samples("superres", 2)
    assert task.reference.shape == (2, 3, 16, 16)
    assert torch.allclose(task.reference[0, :, 3, 5], task.picture[0, :, 12:16, 20:24].mean((1, 2)), atol=1e-6)
    assert task.source[0, 13, 22].tolist() == [13.5 / 4, 22.5 / 4]


def test_no_photograph_is_in_both_splits():
    assert not set(data.PHOTOGRAPHS["train"]) & set(data.PHOTOGRAPHS["held-out"])
    for names in data.PHOTOGRAPHS.values():
        assert all(data.photograph_file(name).is_file() for name in names)


def test_object_and_scene_are_of_different_photographs():
    cutter = data.Cutter("held-out", np.random.default_rng(0), recolour=False)
    seen = []
    cutter._cut = lambda size, name: seen.append(name)
    for _ in range(50):
        cutter.pair()
    assert all(a != b for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_task_refusals(monkeypatch):
    with pytest.raises(ValueError, match="exemplar, tryon, superres"):
        zoo.samples("portrait", 1)
    with pytest.raises(ValueError, match="held-out"):
        zoo.samples("tryon", 1, split="test")
    monkeypatch.setattr(data, "PHOTOGRAPHS", {"held-out": ("nowhere.png", "neither.png")})
    data.photograph.cache_clear()
    with pytest.raises(zoo.MissingPhotographs, match=r"nowhere|neither"):
        zoo.samples("exemplar", 1)


# ----------------------------------------------------------------------------------------------------------- encoder


def test_places_tell_distances_apart():
    places = fourier(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [30.0, 0.0]]), (128, 64, 32, 16, 8))
    assert places.shape == (4, 20)
    similarity = places @ places[0]
    assert similarity[0] > similarity[1] > similarity[3]
    assert similarity[1] == pytest.approx(similarity[2].item())


def test_centres():
    assert centres((2, 3), 4.0)[1, 2].tolist() == [6.0, 10.0]


def test_tokens_are_local():
    encoder = PatchEncoder()
    image = torch.rand(1, 3, 64, 64)
    changed = image.clone()
    changed[..., 8:12, 20:24] = 0
    differs = (encoder(image) != encoder(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 + 2 * 16 + 5]  # after "nothing", row by row
    mixed = PatchEncoder(mixing=1)
    assert (mixed(image) != mixed(changed)).any(-1)[0, 1:].all()
    with pytest.raises(ValueError, match="63×64"):
        encoder(torch.zeros(1, 3, 63, 64))


# --------------------------------------------------------------------------------------------------------- pipelines


def test_frame_of_mask():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 4:8] = 1
    frame = frame_of_mask(mask, 64)
    assert frame[0, 2, 4].tolist() == [8, 8]  # the centre of the first of four pixels that span 64
    assert frame[0, 5, 7].tolist() == [56, 56]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_saved_and_loaded_by_diffusers(name, tmp_path):
    pipe, task = build(name, seed=1), zoo.samples(name, 1)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(paint(loaded, task), paint(pipe, task), atol=1e-4)  # memory is laid out otherwise
    assert json.loads((tmp_path / "model_index.json").read_text())["image_encoder"][1] == "PatchEncoder"
    assert loaded.scheduler.config.prediction_type == "v_prediction"


def test_pil_in_and_out_keeps_the_scene():
    pipe, task = build("exemplar"), zoo.samples("exemplar", 1)
    as_pil = [Image.fromarray(((x[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
              for x in (task.picture, task.reference)]  # fmt: skip
    mask = Image.fromarray((task.mask[0, 0] * 255).byte().numpy())
    options = dict(num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    (picture,) = pipe(as_pil[0], mask, as_pil[1], **options).images
    outside = np.asarray(mask) == 0
    assert picture.size == (64, 64)
    assert np.array_equal(np.asarray(picture)[outside], np.asarray(as_pil[0])[outside])
    options["generator"].manual_seed(0)
    (again,) = pipe(task.picture, task.mask, task.reference, output_type="np", return_dict=False, **options)
    assert np.abs(again[0] - np.asarray(picture) / 255).max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask_image=torch.zeros(1, 1, 64, 64)), "empty mask_image"),
        (dict(mask_image=torch.ones(1, 1, 32, 64)), "does not fit"),
        (dict(reference=torch.zeros(1, 3, 32, 32)), "64×64"),
        (dict(image=torch.zeros(1, 1, 64, 64)), r"image must be \[B, 3, H, W\]"),
        (dict(output_type="latent"), "output_type"),
    ],
)
def test_pipeline_refusals(arguments, message):
    good = dict(
        image=torch.zeros(1, 3, 64, 64), mask_image=torch.ones(1, 1, 64, 64), reference=torch.ones(1, 3, 64, 64)
    )
    with pytest.raises(ValueError, match=message):
        build("exemplar")(**(good | arguments), num_inference_steps=1)


def test_details_go_onto_the_plain_enlargement():
    pipe, task = build("superres", detail=4.0), zoo.samples("superres", 2)
    details = pipe.diffused(task.picture, task.reference)
    assert 0.2 < details.std() < 1
    assert torch.allclose(pipe.picture(details, task.reference), task.picture, atol=1e-5)
    smooth = torch.nn.functional.interpolate(task.reference, scale_factor=4, mode="bicubic")
    enlarged = pipe.picture(torch.zeros_like(details), task.reference)
    assert 0 < (enlarged - task.picture).square().mean() < 0.95 * (smooth - task.picture).square().mean()
    plain = build("superres")
    assert plain.diffused(task.picture, task.reference) is task.picture


def test_enlargements_keep_to_the_small_picture():
    pipe, task = build("superres", detail=4.0), zoo.samples("superres", 2)
    noise = torch.randn(task.picture.shape, generator=torch.Generator().manual_seed(0))
    for details in (torch.zeros_like(noise), noise):
        small = torch.nn.functional.avg_pool2d(pipe.picture(details, task.reference), 4)
        assert (small - task.reference).abs().max() < 0.02 < (task.reference - task.reference.mean()).abs().max()


def test_a_part_of_a_reference_has_the_places_of_the_whole():
    pipe, task = build("tryon", fine=True), data.tryon(data.Cutter("held-out", np.random.default_rng(0)), 1, 32)
    origin = torch.tensor([[20.0, 8.0]])
    moved = pipe.prepare(task.scene, task.mask, task.reference, task.pose, origin)
    told = pipe.prepare(task.scene, task.mask, task.reference, task.pose + origin[:, None, None])
    assert torch.allclose(moved.channels, told.channels, atol=1e-5)
    patches = centres((16, 16), 2.0).reshape(1, -1, 2) + origin[:, None]
    assert torch.allclose(moved.tokens, pipe.image_encoder(task.reference, patches), atol=1e-5)
    assert not torch.allclose(moved.tokens, pipe.image_encoder(task.reference), atol=1e-2)


def test_callback_sees_and_replaces_latents():
    pipe, task, seen = build("tryon"), zoo.samples("tryon", 1), []

    def callback(pipe, step, timestep, state):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(state["latents"])}

    pictures = paint(pipe, task, callback_on_step_end=callback)
    assert seen == [(0, 999), (1, 499)]
    assert (pictures * task.mask).abs().max() == 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_traced_without_being_told_where_the_reference_is(name):
    pipe, task = build(name), zoo.samples(name, 2)
    plain = paint(pipe, task)
    with i2am.trace(pipe, sram={"centre": (32, 32)}) as tracer:
        pictures = paint(pipe, task)
    maps = tracer.maps()
    assert torch.allclose(pictures, plain, atol=1e-4)
    grid = (8, 8) if name == "superres" else (16, 16)
    assert maps.ulam("g2r").shape == (2, *grid)
    assert maps.sram("centre").shape == (2, *grid)
    assert maps.ulam("r2g").shape == (2, 16, 16)
    assert maps.canvas == (64, 64)  # pixels of the picture
    assert sum(maps.counts()["up_blocks.1.attentions.1.transformer_blocks.0.attn2"]) == STEPS


def test_superres_at_another_size():
    pipe = build("superres")
    with i2am.trace(pipe, reference=i2am.Reference(grid=(4, 8), skip=1)) as tracer:
        assert pipe(torch.rand(1, 3, 8, 16) * 2 - 1, num_inference_steps=1, output_type="pt").images.shape[-2:] == (
            32,
            64,
        )
    assert tracer.maps().ulam("g2r").shape == (1, 4, 8)


def test_places_of_a_larger_picture_are_those_of_its_parts():
    pipe = build("superres")
    small = torch.rand(1, 3, 32, 32)
    whole = pipe.prepare(small)
    part = pipe.prepare(small[..., 16:, :16], origin=torch.tensor([[64.0, 0.0]]))
    assert torch.allclose(part.channels, whole.channels[..., 32:, :32], atol=1e-5)
    tokens = whole.tokens[:, 1:].unflatten(1, (16, 16))[:, 8:, :8].flatten(1, 2)
    assert torch.allclose(part.tokens[:, 1:], tokens, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- weights


def test_the_zoo_refuses_strangers(tmp_path):
    with pytest.raises(ValueError, match="exemplar, tryon, superres"):
        zoo.load("portrait")
    with pytest.raises(ValueError, match="superres has no variant 'small'; its variants: 'large'"):
        zoo.load("superres", "small")
    with pytest.raises(ValueError, match="tryon has no variant 'large'; its variants: none"):
        zoo.load("tryon", variant="large")
    with pytest.raises(FileNotFoundError, match="no zoo model"):
        read(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="truncated"):
        read(tmp_path / "broken.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a zoo model"):
        read(tmp_path / "other.safetensors")


def test_shipped_weights_are_small_and_say_how_they_were_made():
    files = {file.stem: file for file in zoo.WEIGHTS.glob("*.safetensors")}
    assert files.keys() == {*zoo.NAMES, *(f"{name}-{v}" for name, vs in zoo.VARIANTS.items() for v in vs)}
    assert sum(file.stat().st_size for file in files.values()) <= 20e6
    for file in files.values():
        _shipped(file)


def _shipped(file):
    assert file.stat().st_size <= 8e6
    _, facts = read(file)
    assert facts["steps"] > 500
    assert facts["mixing"] == 0


@pytest.mark.parametrize("name", zoo.NAMES)
def test_trained_models_use_their_reference(name):
    pipe, task = zoo.load(name), zoo.samples(name, 8, seed=77)
    errors = [
        (((paint(pipe, task, reference) - task.picture) ** 2 * task.object).sum() / (3 * task.object.sum())).item()
        for reference in (task.reference, task.reference.roll(1, 0))
    ]
    assert errors[1] > 2 * errors[0], errors


@pytest.mark.parametrize("variant", [None, "large"])
def test_trained_super_resolution_looks_at_the_aligned_place(variant):
    """At twice the size of most of its training, too: no place is taken for another."""
    pipe, size = zoo.load("superres", variant), 128
    task = data.superres(data.Cutter("held-out", np.random.default_rng(5), recolour=False), 2, size)
    with i2am.trace(pipe, record="qk", layers="up_blocks.1.attentions.1.*") as tracer:
        paint(pipe, task)
    match = tracer.maps().match()
    cells = centres(match.best.shape[1:3], 0.5).expand_as(match.best)  # in tokens, of which two cells have one
    assert ((match.best - cells).abs().amax(-1) < 0.5).float().mean() > 0.95


@pytest.mark.parametrize("name", INPAINTING)
def test_trained_attention_finds_object_and_source(name):
    pipe, task = zoo.load(name), zoo.samples(name, 8, seed=78)
    with i2am.trace(pipe, record="qk", layers=zoo.finest_layers(pipe.unet.attn_processors)) as tracer:
        paint(pipe, task)
    maps = tracer.maps()
    assert metrics.ranking_auc(maps.ulam("r2g"), task.object[:, 0]).mean() > 0.9
    best = maps.match().best
    cell, patch = 64 // best.shape[1], pipe.image_encoder.config.patch_size
    truth = true_places(task, cell)[0].unflatten(1, best.shape[1:3])  # cells of the object alone have one
    truth = truth.masked_fill((true_places(task, cell)[1] == 0).unflatten(1, best.shape[1:3])[..., None], torch.nan)
    assert metrics.correspondence_error(best, truth, patch).nanmedian() < 3  # of 64 pixels; at random it is above 20


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", [*zoo.NAMES, "inpainting"])
def test_training_learns(name, tmp_path):
    run = train.Run(name, 0, 0, tmp_path)
    before = run.average["unet.conv_in.weight"].clone()
    for _ in range(3):
        run.step(2, done=0.1)
    assert all(np.isfinite(run.losses))
    assert not torch.equal(before, run.average["unet.conv_in.weight"])
    assert all(p.grad is not None for n, p in run.model.named_parameters() if "mid_block" not in n)


def test_one_model_for_both_tasks_meets_them_in_turn(tmp_path, monkeypatch):
    run, seen = train.Run("inpainting", 0, 0, tmp_path), []
    for name in INPAINTING:
        task = data.TASKS[name]
        monkeypatch.setitem(
            data.TASKS, name, lambda *args, n=name, task=task: (seen.append((n, args[2])), task(*args))[1]
        )
    for done in (0.0, 0.1, 0.9, 0.95):
        run.step(2, done)
    assert seen == [("exemplar", 32), ("tryon", 32), ("exemplar", 64), ("tryon", 64)]  # small pictures at first


def test_training_goes_on_where_it_was(tmp_path):
    whole = train.Run("exemplar", 0, 0, tmp_path / "whole")
    for _ in range(3):
        whole.step(2, 0.1)
    (tmp_path / "parts").mkdir()
    first = train.Run("exemplar", 0, 0, tmp_path / "parts")
    first.step(2, 0.1)
    first.elapsed = 5.0
    first.checkpoint()
    second = train.Run("exemplar", 0, 0, tmp_path / "parts")
    assert second.elapsed == 5
    for _ in range(2):
        second.step(2, 0.1)
    assert second.losses == whole.losses
    with pytest.raises(SystemExit, match="another run"):
        train.Run("exemplar", 1, 0, tmp_path / "parts")


def test_training_goes_on_from_another_models_weights(tmp_path):
    base = train.Run("inpainting", 3, 0, tmp_path / "base")
    (tmp_path / "base").mkdir()
    base.step(2, 0.1)
    file = base.save(tmp_path / "base" / "inpainting.safetensors")
    tuned = train.Run("tryon", 0, 0, tmp_path, start=file)
    for n, p in tuned.model.named_parameters():
        assert torch.equal(p, tuned.average[n])
        assert torch.allclose(p, base.average[n], atol=1e-3)
    tuned.step(2, 0.0)
    assert tuned.done == train.CURRICULA["inpainting"].started  # the first part of the curriculum is left out
    _, facts = read(tuned.save(tmp_path / "tryon.safetensors"))
    assert facts["started from"]["seed"] == 3
    with pytest.raises(SystemExit, match="another architecture"):
        train.Run("superres", 0, 0, tmp_path, start=file)


def test_places_of_large_pictures_are_taught_in_a_run_of_their_own(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        train.main(["superres", "--places"])
    assert "--start FILE --places" in capsys.readouterr().err
    base = train.Run("superres", 3, 0, tmp_path / "base")
    (tmp_path / "base").mkdir()
    file = base.save(tmp_path / "base" / "superres.safetensors")
    run = train.Run("superres", 0, 0, tmp_path, start=file, curriculum="places")
    counts = []
    elsewhere = run._elsewhere
    monkeypatch.setattr(run, "_elsewhere", lambda *args: (counts.append(args[-1]), elsewhere(*args))[1])
    for done in (0.0, 0.3):
        run.step(1, done)
    assert counts == [1024, 2048]
    assert read(run.save(tmp_path / "superres.safetensors"))[1]["places"]
    run.checkpoint()
    with pytest.raises(SystemExit, match="another run"):
        train.Run("superres", 0, 0, tmp_path, start=file)


@pytest.mark.parametrize("name", ["superres", "inpainting"])
def test_held_out_errors_are_of_the_averaged_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 1)
    run = train.Run(name, 0, 0, tmp_path)
    for p in run.model.parameters():
        p.data.fill_(float("nan"))
    run.test()
    run.test()
    assert all(p.isnan().all() for p in run.model.parameters())
    header, first, second = [line.split(",") for line in (tmp_path / "heldout.csv").read_text().splitlines()]
    assert first == second
    row = dict(zip(header, map(float, first), strict=True))
    assert row.keys() >= {"minutes", "cpu minutes", "steps", *run.tasks}
    assert all(0.01 < row[task] < 3 for task in run.tasks)


# -------------------------------------------------------------------------------------------------- flow supervision


def test_true_places_are_means_over_cells():
    task = zoo.samples("exemplar", 1, seed=2)
    places, inside = true_places(task, 4)
    assert places.shape == (1, 256, 2)
    cell = int(inside[0].argmax())
    y, x = cell // 16 * 4, cell % 16 * 4
    here = task.source[0, y : y + 4, x : x + 4].flatten(0, 1)
    assert torch.allclose(places[0, cell], here[~here.isnan().any(-1)].mean(0), atol=1e-4)
    assert inside.sum() < task.object.sum() / 16 + 40


@pytest.mark.parametrize("name", ["tryon", "superres"])
def test_flow_supervision_is_least_where_attention_looks_at_the_source(name):
    """Queries and keys are set so that attention is a bell around a place: the true one, then one that is off."""
    pipe, task = build(name, fine=name == "tryon"), zoo.samples(name, 2, seed=4)
    flow = FlowSupervision(pipe, torch.Generator().manual_seed(0))
    patch = pipe.image_encoder.config.patch_size
    cell = 4
    places, _ = true_places(task, cell)
    grid = pipe.image_encoder.grid(*task.reference.shape[-2:])
    patches = centres(grid, patch).reshape(-1, 2)

    class Bell(torch.nn.Module):
        heads, scale = 1, 1 / (0.7 * patch) ** 2

        def to_q(self, x):
            return torch.cat([x, torch.ones_like(x[..., :1])], -1)

        def to_k(self, x):
            return torch.cat([x, -x.square().sum(-1, keepdim=True) / 2], -1)

    tokens = torch.cat([torch.full((1, 1, 2), 1e3), patches[None]], 1).expand(2, -1, -1)  # "nothing" is far away
    losses = []
    for off in (0.0, 2.0, 6.0):
        with flow:
            flow.seen.append((Bell(), places + off, tokens))
            losses.append(flow.loss(task).item())
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert losses[0] < losses[1] < losses[2]


def test_flow_supervision_teaches_where_to_look(tmp_path):
    run = train.Run("tryon", 0, 0, tmp_path)
    sample = run._draw(8)
    with run.flow:
        run.loss(sample)
        before = run.flow.loss(sample)
        assert {x[2].shape[-1] for x in run.flow.seen} == {64}  # cross-attention alone: the tokens' width
        before.backward()
    assert not run.flow.watching
    run.loss(sample)
    assert run.flow.seen == []  # nothing is kept unless it is asked for
    assert run.pipe.image_encoder.place.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- command


def test_train_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 1)
    arguments = ["exemplar", "--minutes", "0.02", "--batch", "1", "--snapshots", "2", "--seed", "4"]
    train.main([*arguments, "--out", str(tmp_path)])
    there = {p.name for p in tmp_path.iterdir()}
    files = {"exemplar.safetensors", "checkpoint.pt", "loss.csv", "loss.png", "snapshot-02.safetensors", "heldout.csv"}
    assert there >= files
    pipe, facts = read(tmp_path / "exemplar.safetensors")
    assert facts["seed"] == 4
    assert facts["steps"] == len((tmp_path / "loss.csv").read_text().splitlines()) - 1
    assert isinstance(pipe, ReferenceInpaintingPipeline)
    assert str(tmp_path) in capsys.readouterr().out


def test_weights_survive_saving(tmp_path):
    pipe = build("exemplar", seed=3)
    weights = {
        f"{part}.{n}": p for part in ("unet", "image_encoder") for n, p in getattr(pipe, part).named_parameters()
    }
    loaded, facts = read(save("exemplar", weights, tmp_path / "x.safetensors", {"mixing": 0, "seed": 3}))
    assert facts == {"mixing": 0, "seed": 3}
    task = zoo.samples("exemplar", 1)
    assert torch.allclose(paint(loaded, task), paint(pipe, task), atol=0.02)
