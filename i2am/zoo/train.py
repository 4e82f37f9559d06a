"""``python -m i2am.zoo.train NAME --minutes M --seed S``: trains a model of the zoo, on a CPU if need be.

Progress is shown; a checkpoint is written every minute, and the same command goes on from it. The folder ends up with
``NAME.safetensors`` (averaged weights in float16), ``loss.csv`` and ``loss.png``, ``heldout.csv`` (error on held-out
tasks against time) and snapshots along the way. ``--start FILE`` goes on from another run's weights.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2am.zoo import data
from i2am.zoo.flow import FlowSupervision
from i2am.zoo.pipelines import FOLD, Prepared, SuperResolutionPipeline, ZooPipeline, bicubic, build
from i2am.zoo.storage import read, save

LEARNING_RATE = 1e-3
WARM_UP = 60  # steps
DECAY = 0.995  # of the averaged weights
KNOWN = 0.1  # weight of the loss where the picture is given
CANVAS = 1024  # pixels: places that a super-resolution must tell apart
TOGETHER = {"inpainting": ("exemplar", "tryon")}  # one model for both tasks, to be tuned to each of them
NOISY = 2.0  # noise levels are drawn from 1 - u², since without noise a model needs no reference
DETAIL = 4.0  # gain of the details that a super-resolution diffuses: their standard deviation is 0.14 in pictures
HELD_OUT = 16  # tasks of heldout.csv
Schedule = tuple[tuple[float, int], ...]  # (share of the run, what holds from there on)


@dataclass(frozen=True)
class Curriculum:
    """Course of a run: what it is shown, and when, in shares of it.

    Args:
        growth: pixels a side of the pictures. Small ones have few places, so looking at the right one is learned in
            minutes; but group norms see the whole picture, so a model of small ones alone is lost in a large one.
        flow: weight of the flow supervision at first, the share of the run in which it fades, and what stays of it.
        elsewhere: tokens from other places that a super-resolution must not confuse with its own, interpolated.
        shrink: by which power of their side pictures get fewer per step.
        draws: noise levels per task: cutting one costs a fifth of a step.
        started: share of the curriculum that a run from another's weights leaves out.
    """

    growth: Schedule
    flow: tuple[float, float, float]
    elsewhere: Schedule = ((0.0, 0),)
    shrink: int = 2
    draws: int = 1
    started: float = 0.0


CURRICULA = {
    "inpainting": Curriculum(((0.0, 32), (0.7, 64)), (0.1, 0.4, 0.0), shrink=1, draws=2, started=0.7),
    # No tokens from elsewhere while it learns to look, in the end a quarter of those that fill the canvas. Some flow
    # supervision stays, or its finest layers forget where they looked, since their neighbours serve nearly as well.
    "superres": Curriculum(
        ((0.0, 32), (0.12, 64), (0.6, 128)),
        (0.1, 0.4, 0.03),
        elsewhere=((0.3, 0), (0.5, 192), (0.85, 192), (0.9, 1024)),
        started=0.2,
    ),
    # A second run of it, for large pictures: half as many tokens from elsewhere as fill the canvas, nearly all along.
    "places": Curriculum(((0.0, 64), (0.85, 128)), (0.1, 1.0, 0.05), elsewhere=((0.0, 1024), (0.25, 2048))),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m i2am.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*data.TASKS, *TOGETHER])
    parser.add_argument(
        "--minutes", type=float, default=30, help="of this process's computing, over all resumptions (default 30)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mixing", type=int, default=0, help="transformer layers over the reference (an ablation)")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help=f"learning rate (default {LEARNING_RATE})")
    parser.add_argument("--start", type=Path, help="weights to go on from (default: random ones)")
    parser.add_argument(
        "--places", action="store_true", help="for superres, from weights: learn to tell a large picture's places apart"
    )
    parser.add_argument("--snapshots", type=int, default=12, help="averaged weights to keep along the way")
    parser.add_argument("--out", type=Path, help="folder (default zoo-training/NAME)")
    args = parser.parse_args(argv)
    if args.places and (args.name != "superres" or args.start is None):
        parser.error("--places goes on from a superres: superres --start FILE --places")
    out = args.out or Path("zoo-training") / args.name
    torch.set_num_threads(1)  # models this small lose more to threads that wait for each other
    out.mkdir(parents=True, exist_ok=True)
    curriculum = "places" if args.places else None
    run = Run(args.name, args.seed, args.mixing, out, rate=args.rate, start=args.start, curriculum=curriculum)
    print(f"written to {train(run, args.minutes, args.batch, args.snapshots)}")


def train(run: Run, minutes: float, batch: int, snapshots: int) -> Path:
    """Train for ``minutes`` of processor time, all resumptions together, and return the weights' file.

    Not of the wall's clock: what else runs on the machine would shorten the run.
    """
    from tqdm import tqdm

    name, out = run.name, run.out
    due = [(i + 1) / snapshots for i in range(snapshots)]
    due = due[sum(run.cpu / (60 * minutes) >= share for share in due) :]
    last, last_cpu, saved = time.perf_counter(), time.process_time(), time.perf_counter()
    with tqdm(total=100, initial=round(100 * min(run.cpu / 60 / minutes, 1)), unit="%", desc=name) as bar:
        while run.cpu < 60 * minutes:
            run.step(batch, run.cpu / (60 * minutes))
            now = time.perf_counter()
            run.elapsed, last = run.elapsed + now - last, now
            run.cpu, last_cpu = run.cpu + time.process_time() - last_cpu, time.process_time()
            done = run.cpu / (60 * minutes)
            bar.n = round(100 * min(done, 1))
            bar.set_postfix_str(f"step {len(run.losses)}, loss {np.mean(run.losses[-50:]):.4f}")
            if due and done >= due[0]:
                run.save(out / f"snapshot-{snapshots - len(due) + 1:02d}.safetensors")
                due.pop(0)
                run.test()
            if now - saved > 60:
                run.checkpoint()
                saved = now
    run.checkpoint()
    run.draw()
    for task in TOGETHER.get(name, ()):
        run.save(out / f"{task}.safetensors", task)
    return run.save(out / f"{name}.safetensors")


class Run:
    """A training run: the model, its averaged weights, the optimiser, and what was seen."""

    def __init__(
        self,
        name: str,
        seed: int,
        mixing: int,
        out: Path,
        rate: float = LEARNING_RATE,
        start: Path | None = None,
        curriculum: str | None = None,
    ):
        self.name, self.seed, self.mixing, self.out, self.rate = name, seed, mixing, out, rate
        self.course = curriculum or ("superres" if name == "superres" else "inpainting")
        self.curriculum = CURRICULA[self.course]
        self.tasks = TOGETHER.get(name, (name,))
        self.shape: dict[str, object] = dict(detail=DETAIL) if name == "superres" else dict(fine=True)  # of the model
        self.started_from: dict[str, object] | None = None
        if start is not None:
            weights, self.started_from = read(start)
            self.mixing, self.shape["fine"] = self.started_from["mixing"], self.started_from.get("fine", False)
        self.pipe: ZooPipeline = build(name, seed, self.mixing, **self.shape)
        if start is not None:
            self._take_over(weights, start)
        self.model = nn.ModuleDict({"unet": self.pipe.unet, "image_encoder": self.pipe.image_encoder}).train()
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.cutter = data.Cutter("train", np.random.default_rng(seed))
        self.noise = torch.Generator().manual_seed(seed)
        self.flow = FlowSupervision(self.pipe, self.noise)
        self.losses: list[float] = []
        self.elapsed = self.cpu = 0.0  # seconds
        self.done = 0.0  # share of the curriculum that is over
        if self._file.is_file():
            self._resume()

    def step(self, batch: int, done: float) -> None:
        """Take one optimiser step; ``done`` is the share of the run that is over."""
        rate = self.rate * min(1, (len(self.losses) + 1) / WARM_UP) * (0.02 + 0.98 * math.cos(done * math.pi / 2))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        skipped = 0.0 if self.started_from is None else self.curriculum.started
        self.done = skipped + (1 - skipped) * done
        sample = self._draw(batch)
        first, fade, rest = self.curriculum.flow
        weight = rest + (first - rest) * max(0.0, 1 - done / fade)
        with self.flow:
            loss = self.loss(sample)
            total = loss + weight * self.flow.loss(sample) if weight > 0 else loss
        self.optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.losses.append(loss.item())
        decay = min(DECAY, (1 + len(self.losses)) / (10 + len(self.losses)))
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                self.average[n].lerp_(p, 1 - decay)

    def _draw(self, batch: int) -> data.Sample:
        """Cut ``batch / DRAWS`` tasks, each of them DRAWS times in a row; fewer large pictures than small ones."""
        draws = self.curriculum.draws
        size = max(size for start, size in self.curriculum.growth if start <= self.done)
        count = max(round(batch / draws * (32 / size) ** self.curriculum.shrink), 1)
        task = self.tasks[len(self.losses) % len(self.tasks)]
        sample = data.TASKS[task](self.cutter, count, size)
        return data.Sample(*(x if x is None else x.repeat_interleave(draws, 0) for x in sample))

    def loss(self, sample: data.Sample) -> Tensor:
        """Return squared error of the velocity at random noise levels, mostly of what is to be painted."""
        wanted = sample.picture
        if isinstance(self.pipe, SuperResolutionPipeline):
            wanted = self.pipe.diffused(sample.picture, sample.reference)
        clean = F.pixel_unshuffle(wanted, FOLD)
        noise = torch.randn(clean.shape, generator=self.noise)
        level = 1 - torch.rand(len(clean), generator=self.noise) ** NOISY
        steps = self.pipe.scheduler.config.num_train_timesteps
        timestep = (level * steps).long().clamp_max(steps - 1)
        noisy = self.pipe.scheduler.add_noise(clean, noise, timestep)
        velocity = self.pipe.scheduler.get_velocity(clean, noise, timestep)
        error = (self.pipe.predict(noisy, timestep, self.prepare(sample)) - velocity).square()
        weight = KNOWN + (1 - KNOWN) * F.avg_pool2d(sample.mask, FOLD)
        return (error * weight).sum() / (weight.sum() * error.shape[1])

    def prepare(self, sample: data.Sample) -> Prepared:
        batch, size = len(sample.picture), sample.picture.shape[-1]
        if not isinstance(self.pipe, SuperResolutionPipeline):
            room = data.SIZE - size
            origin = torch.rand((batch, 2), generator=self.noise) * room if room else None
            return self.pipe.prepare(sample.scene, sample.mask, sample.reference, sample.pose, origin)
        origin = torch.randint(CANVAS - size, (batch, 2), generator=self.noise).float()
        prepared = self.pipe.prepare(sample.reference, origin)
        count = round(np.interp(self.done, *zip(*self.curriculum.elsewhere, strict=True)))
        if count == 0:
            return prepared
        elsewhere = self._elsewhere(sample.reference, origin, size, count)
        return prepared._replace(tokens=torch.cat([prepared.tokens, elsewhere], 1))

    def _elsewhere(self, reference: Tensor, origin: Tensor, size: int, count: int) -> Tensor:
        """Return tokens of other pictures elsewhere on a large canvas: near, in the same rows or columns, anywhere."""
        pixels = self.pipe.image_encoder.config.patch_size * self.pipe.image_encoder.config.stride
        shape = (len(origin), count, 2)
        near = size * (4 * torch.rand(shape, generator=self.noise) - 1.5)
        far = CANVAS * torch.rand(shape, generator=self.noise) - origin[:, None]
        same_row = torch.rand((*shape[:2], 1), generator=self.noise) < 0.5
        same = torch.cat([same_row, ~same_row], -1)
        lines = torch.where(same, size * torch.rand(shape, generator=self.noise), far)
        kind = torch.arange(count)[:, None] % 3
        offset = torch.where(kind == 0, near, torch.where(kind == 1, lines, far))
        offset = (offset / pixels).floor() * pixels + pixels / 2  # where a larger picture has patches: no alias escapes
        inside = ((offset > 0) & (offset < size)).all(-1, keepdim=True)
        places = origin[:, None] + offset + size * inside
        patch = self.pipe.image_encoder.config.patch_size
        patches = reference.roll(1, 0).unfold(2, patch, patch).unfold(3, patch, patch).flatten(2, 3)  # [B, 3, N, p, p]
        chosen = patches[:, :, torch.randint(patches.shape[2], (count,), generator=self.noise)]
        row = chosen.permute(0, 1, 3, 2, 4).flatten(3)  # one row of patches: [B, 3, p, count·p]
        return self.pipe.image_encoder(row, places)[:, 1:]

    def test(self) -> None:
        """Append the averaged weights' error on held-out tasks to heldout.csv, against time."""
        model, pipe = self.model, self.pipe
        trained = {n: p.detach().clone() for n, p in model.named_parameters()}
        self._load(self.average)
        row = {"minutes": self.elapsed / 60, "cpu minutes": self.cpu / 60, "steps": len(self.losses)}
        options = dict(output_type="pt", generator=torch.Generator().manual_seed(0))
        for name in self.tasks:
            task = data.samples(name, HELD_OUT, seed=20_000)
            if isinstance(pipe, SuperResolutionPipeline):
                drawn = [pipe(task.reference, num_inference_steps=5, **options).images * 2 - 1 for _ in range(2)]
                plain = bicubic(task.reference, task.picture.shape[-2:]).clamp(-1, 1)
                row |= {"mean of 2": _error(torch.stack(drawn).mean(0), task), "bicubic": _error(plain, task)}
            else:
                scene = (task.picture, task.mask, task.reference, task.pose)
                drawn = [pipe(*scene, num_inference_steps=4, **options).images * 2 - 1]
            row[name] = _error(drawn[0], task)
        self._load(trained)
        file = self.out / "heldout.csv"
        new = not file.is_file()
        with file.open("a", newline="") as rows:
            writer = csv.writer(rows)
            if new:
                writer.writerow(row)
            writer.writerow([round(x, 5) for x in row.values()])

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(weights[n])

    def _take_over(self, other: ZooPipeline, file: Path) -> None:
        try:
            for part in ("unet", "image_encoder"):
                getattr(self.pipe, part).load_state_dict(getattr(other, part).state_dict())
        except RuntimeError as error:
            raise SystemExit(f"{file} has another architecture than a new {self.name}") from error

    # -------------------------------------------------------------------------------------------------------- files

    @property
    def _file(self) -> Path:
        return self.out / "checkpoint.pt"

    def checkpoint(self) -> None:
        state = {
            "run": [self.name, self.seed, self.mixing, self.course],
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "cutter": self.cutter.rng.bit_generator.state,
            "noise": self.noise.get_state(),
            "losses": self.losses,
            "elapsed": self.elapsed,
            "cpu": self.cpu,
        }
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._file)

    def _resume(self) -> None:
        state = torch.load(self._file, weights_only=True)
        if state["run"] != [self.name, self.seed, self.mixing, self.course]:
            raise SystemExit(f"{self._file} is of another run ({state['run']}): choose another --out")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.cutter.rng.bit_generator.state = state["cutter"]
        self.noise.set_state(state["noise"])
        self.losses, self.elapsed, self.cpu = state["losses"], state["elapsed"], state["cpu"]

    def save(self, file: Path, name: str | None = None) -> Path:
        """Save the averaged weights, as :func:`i2am.zoo.load` reads them; of a joint run under one task's ``name``."""
        facts = {
            "seed": self.seed,
            "steps": len(self.losses),
            "minutes": round(self.cpu / 60, 1),
            "mixing": self.mixing,
            "rate": self.rate,
        }
        facts |= self.shape
        if self.course == "places":
            facts["places"] = True
        if self.started_from is not None:
            facts["started from"] = self.started_from
        return save(name or self.name, self.average, file, facts)

    def draw(self) -> None:
        """Draw loss.csv and loss.png."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with (self.out / "loss.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *enumerate(self.losses, 1)])
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        window = max(len(self.losses) // 50, 1)
        smooth = np.convolve(self.losses, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(window, len(self.losses) + 1), smooth)
        axes.set(xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log", title=self.name)
        FigureCanvasAgg(figure)
        figure.savefig(self.out / "loss.png", dpi=120)


def _error(pictures: Tensor, task: data.Sample) -> float:
    """Return mean squared error on the objects, colours in [-1, 1], averaged over tasks."""
    squares = ((pictures - task.picture).square() * task.object).sum((1, 2, 3))
    return (squares / (3 * task.object.sum((1, 2, 3)))).mean().item()


if __name__ == "__main__":
    main()
