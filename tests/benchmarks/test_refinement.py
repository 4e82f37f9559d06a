"""The evidence on losses: runs go on where they stopped, differ in one loss, and the page says what was found."""

import json

import numpy as np
import pytest
import torch

import i2am
from benchmarks.refinement import __main__ as command
from benchmarks.refinement import guidance, training
from benchmarks.refinement.lessons import LESSONS, known_places, reference_of, told
from benchmarks.refinement.statistics import Room, relative
from benchmarks.refinement.training import Plan, Run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Plan("small", size=16, batch=2, steps=1, samples=16)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_a_run_that_was_stopped_ends_where_a_whole_one_does(tmp_path):
    whole = Run(SMALL, "flow", 3, tmp_path / "whole")
    for _ in range(3):
        whole.step()
    stopped = Run(SMALL, "flow", 3, tmp_path / "stopped")
    with pytest.raises(training.OutOfTime):
        stopped.train(3, until=0)
    assert stopped.done == 1
    again = Run(SMALL, "flow", 3, tmp_path / "stopped")
    again.train(3, until=float("inf"))
    assert again.done == 3
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    (point,) = json.loads(again.file.read_text())
    assert point["steps"] == 3
    assert all(len(point[key]) == 16 for key in ("error", "sram", "place", "imacs r2g", "imacs g2r"))
    measured = again.points
    Run(SMALL, "flow", 3, tmp_path / "stopped").train(3, until=0)  # nothing is left to do
    assert json.loads(again.file.read_text()) == measured


def test_conditions_see_the_same_tasks_and_differ_in_their_loss(tmp_path):
    runs = {name: Run(SMALL, name, 0, tmp_path) for name in LESSONS}
    samples = {name: run._draw() for name, run in runs.items()}
    for sample, level, noise in samples.values():
        assert torch.equal(sample.picture, samples["plain"][0].picture)
        assert torch.equal(level, samples["plain"][1])
        assert torch.equal(noise, samples["plain"][2])
    for run in runs.values():
        run.step()
    after = {name: weights(run) for name, run in runs.items()}
    assert torch.equal(after["flow"], after["flow, 400 steps"])  # not over yet
    others = [after[name] for name in ("plain", "flow", "inside", "photometric", "flow, encoder", "flow, decoder")]
    for i, a in enumerate(others):
        assert all(not torch.equal(a, b) for b in others[:i])


def test_a_gate_and_an_end():
    level = torch.tensor([0.1, 0.5])
    assert LESSONS["photometric, gated"].counts(level, 0).tolist() == [1, 0]
    assert LESSONS["photometric"].counts(level, 10**6).tolist() == [1, 1]
    assert LESSONS["flow, 400 steps"].counts(level, 399).tolist() == [1, 1]
    assert LESSONS["flow, 400 steps"].counts(level, 400).tolist() == [0, 0]


def test_the_flow_loss_is_least_at_the_true_source(tmp_path):
    run = Run(SMALL, "flow", 0, tmp_path)
    sample, _, _ = run._draw()
    prepared = run.pipe.prepare(sample.scene, sample.mask, sample.reference)
    with i2am.probe(run.pipe.unet, reference=reference_of(run.pipe, 16), reads=("expected", "mass")) as probe:
        run.pipe.predict(torch.randn(2, 12, 8, 8), torch.tensor([500, 500]), prepared)
    read = probe.reads[0]
    places, there = known_places(read, sample)
    assert there.any()
    assert places[there > 0].amin() > -1
    assert places[there > 0].amax() < 8
    told_true = read.values._replace(expected=places[:, None].expand_as(read.expected), mass=torch.ones_like(read.mass))
    true = read.__class__(read.layer, read.reference, read.grid, read.key_grid, told_true)
    lesson, everyone = LESSONS["flow"], torch.ones(2)
    assert told(lesson, [true], sample, everyone).item() == pytest.approx(0, abs=1e-9)
    assert told(lesson, [read], sample, everyone).item() > 0.01
    assert told(lesson, [read], sample, torch.zeros(2)).item() == 0


def test_guidance_moves_latents_downhill_by_its_share():
    plan = Plan("guidance", size=16, shipped=False)
    pipe = plan.pipeline(0)
    sample = next(training.held_out(plan, 16))
    sample = type(sample)(*(None if x is None else x[:2] for x in sample))
    prepared = pipe.prepare(sample.scene, sample.mask, sample.reference)
    latents, timestep = torch.randn(2, 12, 8, 8), torch.tensor(500)
    lesson = LESSONS["flow"]

    def score(x):
        with i2am.probe(pipe.unet, reference=reference_of(pipe, 16), reads=lesson.reads) as probe:
            pipe.predict(x, timestep, prepared)
        return told(lesson, probe.reads, sample, torch.ones(2)).item()

    moved = guidance.mover(pipe, sample, "flow", 0.01)(latents, timestep, prepared)
    off = (moved - latents).flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)
    torch.testing.assert_close(off, torch.full((2,), 0.01), rtol=1e-4, atol=0)
    assert score(moved) < score(latents)
    still = guidance.mover(pipe, sample, None, 0.0)(latents, timestep, prepared)
    assert torch.equal(still, latents)


# ------------------------------------------------------------------------------------------------------------ the page


def stored(folder, condition, seed, errors, cpu):
    points = [
        {"steps": steps, "cpu": cpu * steps}
        | {key: list(np.asarray(error) * scale) for key, scale in (("error", 1), ("sram", 30), ("place", 20))}
        | {"imacs r2g": [0.1] * len(error), "imacs g2r": [0.1] * len(error)}
        for steps, error in errors.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{training.stem(condition)}-{seed}.json").write_text(json.dumps(points))


def test_changes_are_paired_and_equal_time_is_interpolated(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.1, 0.5, 208)
    for seed in (0, 1):
        stored(tmp_path, "plain", seed, {200: base, 400: base}, 1.0)
        stored(tmp_path, "flow", seed, {200: base, 400: 0.5 * base}, 1.25)
    stored(tmp_path, "flow, 400 steps", 7, {400: base}, 1.0)
    room = Room(tmp_path, {name: training.stem(name) for name in ("plain", "flow")})
    assert room.seeds("flow", 400, 208) == [0, 1]  # the other condition's file is not taken for it
    assert room.change("flow", [0, 1], 400) == pytest.approx([-50, -50, -50])
    assert room.price("flow", [0, 1], 400) == pytest.approx(1.25)
    steps, change = room.equal_time("flow", [0, 1], 400)
    assert steps == pytest.approx(320)
    assert change[0] == pytest.approx(-50 * np.log(320 / 200) / np.log(2))
    value, low, high = relative(rng.permutation(base), base)
    assert low < value < high


def test_the_page_says_what_was_found_and_what_is_missing(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.1, 0.5, 208)
    state = tmp_path / "state"
    for seed in (0, 1, 2):
        stored(state / "scratch", "plain", seed, {200: base, 400: base}, 1.0)
        stored(state / "scratch", "flow", seed, {200: base, 400: 0.75 * base}, 1.25)
        stored(state / "scratch", "inside", seed, {200: base, 400: 1.1 * base}, 1.1)
    for setting in guidance.SETTINGS:
        worse = base if setting == "none" else 1.02 * base
        training.write(
            state / "guidance" / f"{training.stem(setting)}.json",
            json.dumps({"setting": setting, "error": list(worse)}),
        )
    text = command.write_page(state, tmp_path, [400, 1600], quick=False).read_text()
    assert "`flow` lowers the error at equal steps" in text
    assert "`inside` raises the error at equal steps" in text
    assert "-25.0 % [-25.0, -25.0]" in text
    missing = (
        "Not measured in this run after 1,600 steps: `python -m benchmarks.refinement --parts scratch --steps 1600`"
    )
    assert missing in text
    stored(state / "scratch", "inside", 1, {200: base, 400: 0.9 * base}, 1.1)
    again = command.write_page(state, tmp_path, [400, 1600], quick=False).read_text()
    assert "`inside` has seeds that disagree about the error at equal steps" in again
    assert "No setting is better than no guidance" in text
    assert (tmp_path / "images" / "refinement-scratch.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_whole_program_at_a_small_size(tmp_path):
    arguments = ["--quick", "--seeds", "0", "--steps", "1", "--state", str(tmp_path / "state"), "--docs", str(tmp_path)]
    text = command.main(arguments).read_text()
    assert text.count("**After 1 steps**") == 7
    assert "not measured" not in text.lower()
