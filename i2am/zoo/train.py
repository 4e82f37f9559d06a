"""``python -m i2am.zoo.train NAME --minutes M --seed S``: trains a model of the zoo, on a CPU if need be.

Progress is shown; a checkpoint is written every minute, and the same command goes on from it. The folder ends up with
``NAME.safetensors`` (averaged weights in float16), ``loss.csv`` and ``loss.png``, and snapshots along the way.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2am.zoo import data
from i2am.zoo.pipelines import FOLD, Prepared, SuperResolutionPipeline, ZooPipeline, build
from i2am.zoo.storage import save

LEARNING_RATE = 1e-3
WARM_UP = 60  # steps
DECAY = 0.995  # of the averaged weights
KNOWN = 0.1  # weight of the loss where the picture is given
CANVAS = 1024  # pixels: places that a super-resolution must tell apart
# Tokens from other places that a super-resolution must not confuse with its own, by share of the run: none while it
# learns to look, in the end a quarter of those that fill the canvas.
ELSEWHERE = ((0.3, 0), (0.5, 192), (0.7, 192), (0.75, 4096))
# Of a super-resolution: (share of the run, pixels a side). Small pictures have few places, so looking at the right one
# is learned in minutes; but group norms see the whole picture, so a model of small ones alone is lost in a large one.
GROWTH = ((0.0, 32), (0.12, 64), (0.5, 128))
NOISY = 2.0  # a super-resolution draws its noise levels from 1 - u², since without noise it needs no reference


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m i2am.zoo.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(data.TASKS))
    parser.add_argument("--minutes", type=float, default=30, help="of training, over all resumptions (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mixing", type=int, default=0, help="transformer layers over the reference (an ablation)")
    parser.add_argument("--snapshots", type=int, default=12, help="averaged weights to keep along the way")
    parser.add_argument("--out", type=Path, help="folder (default zoo-training/NAME)")
    args = parser.parse_args(argv)
    out = args.out or Path("zoo-training") / args.name
    print(f"written to {train(args.name, args.minutes, args.seed, args.batch, args.mixing, args.snapshots, out)}")


def train(name: str, minutes: float, seed: int, batch: int, mixing: int, snapshots: int, out: Path) -> Path:
    """Trains for ``minutes`` and returns the weights' file; goes on where ``out`` holds a checkpoint."""
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    run = Run(name, seed, mixing, out)
    due = [(i + 1) / snapshots for i in range(snapshots)]
    due = due[sum(run.elapsed / (60 * minutes) >= share for share in due) :]
    last, saved = time.perf_counter(), time.perf_counter()
    with tqdm(total=100, initial=round(100 * min(run.elapsed / 60 / minutes, 1)), unit="%", desc=name) as bar:
        while run.elapsed < 60 * minutes:
            run.step(batch, run.elapsed / (60 * minutes))
            now = time.perf_counter()
            run.elapsed, last = run.elapsed + now - last, now
            done = run.elapsed / (60 * minutes)
            bar.n = round(100 * min(done, 1))
            bar.set_postfix_str(f"step {len(run.losses)}, loss {np.mean(run.losses[-50:]):.4f}")
            if due and done >= due[0]:
                run.save(out / f"snapshot-{snapshots - len(due) + 1:02d}.safetensors")
                due.pop(0)
            if now - saved > 60:
                run.checkpoint()
                saved = now
    run.checkpoint()
    run.draw()
    return run.save(out / f"{name}.safetensors")


class Run:
    """A training run: the model, its averaged weights, the optimiser, and what was seen."""

    def __init__(self, name: str, seed: int, mixing: int, out: Path):
        self.name, self.seed, self.mixing, self.out = name, seed, mixing, out
        self.pipe: ZooPipeline = build(name, seed, mixing)
        self.model = nn.ModuleDict({"unet": self.pipe.unet, "image_encoder": self.pipe.image_encoder}).train()
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.cutter = data.Cutter("train", np.random.default_rng(seed))
        self.noise = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.elapsed = 0.0  # seconds
        self.done = 0.0  # share of the run that is over
        if self._file.is_file():
            self._resume()

    def step(self, batch: int, done: float) -> None:
        """One optimiser step; ``done`` is the share of the run that is over."""
        rate = LEARNING_RATE * min(1, (len(self.losses) + 1) / WARM_UP) * (0.02 + 0.98 * math.cos(done * math.pi / 2))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.done = done
        if self.name == "superres":
            size = max(size for start, size in GROWTH if start <= done)
            sample = data.superres(self.cutter, max(batch * data.SIZE**2 // (2 * size**2), 1), size)
        else:
            sample = data.TASKS[self.name](self.cutter, batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(sample)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.losses.append(loss.item())
        decay = min(DECAY, (1 + len(self.losses)) / (10 + len(self.losses)))
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                self.average[n].lerp_(p, 1 - decay)

    def loss(self, sample: data.Sample) -> Tensor:
        """Squared error of the velocity at random noise levels, mostly of what is to be painted."""
        clean = F.pixel_unshuffle(sample.picture, FOLD)
        noise = torch.randn(clean.shape, generator=self.noise)
        level = torch.rand(len(clean), generator=self.noise)
        level = 1 - level**NOISY if self.name == "superres" else level
        steps = self.pipe.scheduler.config.num_train_timesteps
        timestep = (level * steps).long().clamp_max(steps - 1)
        noisy = self.pipe.scheduler.add_noise(clean, noise, timestep)
        velocity = self.pipe.scheduler.get_velocity(clean, noise, timestep)
        error = (self.pipe.predict(noisy, timestep, self.prepare(sample)).float() - velocity).square()
        weight = KNOWN + (1 - KNOWN) * F.avg_pool2d(sample.mask, FOLD)
        return (error * weight).sum() / (weight.sum() * error.shape[1])

    def prepare(self, sample: data.Sample) -> Prepared:
        if not isinstance(self.pipe, SuperResolutionPipeline):
            return self.pipe.prepare(sample.scene, sample.mask, sample.reference, sample.pose)
        batch, size = len(sample.picture), sample.picture.shape[-1]
        origin = torch.randint(CANVAS - size, (batch, 2), generator=self.noise).float()
        prepared = self.pipe.prepare(sample.reference, origin)
        count = round(np.interp(self.done, *zip(*ELSEWHERE, strict=True)))
        if count == 0:
            return prepared
        elsewhere = self._elsewhere(sample.reference, origin, size, count)
        return prepared._replace(tokens=torch.cat([prepared.tokens, elsewhere], 1))

    def _elsewhere(self, reference: Tensor, origin: Tensor, size: int, count: int) -> Tensor:
        """Tokens of other pictures at other places of a large canvas: near, in the same rows or columns, anywhere."""
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

    # -------------------------------------------------------------------------------------------------------- files

    @property
    def _file(self) -> Path:
        return self.out / "checkpoint.pt"

    def checkpoint(self) -> None:
        state = {
            "run": [self.name, self.seed, self.mixing],
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "cutter": self.cutter.rng.bit_generator.state,
            "noise": self.noise.get_state(),
            "losses": self.losses,
            "elapsed": self.elapsed,
        }
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._file)

    def _resume(self) -> None:
        state = torch.load(self._file, weights_only=True)
        if state["run"] != [self.name, self.seed, self.mixing]:
            raise SystemExit(f"{self._file} is of another run ({state['run']}): choose another --out")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.cutter.rng.bit_generator.state = state["cutter"]
        self.noise.set_state(state["noise"])
        self.losses, self.elapsed = state["losses"], state["elapsed"]

    def save(self, file: Path) -> Path:
        """The averaged weights, as :func:`i2am.zoo.load` reads them."""
        facts = {
            "seed": self.seed,
            "steps": len(self.losses),
            "minutes": round(self.elapsed / 60, 1),
            "mixing": self.mixing,
        }
        return save(self.name, self.average, file, facts)

    def draw(self) -> None:
        """loss.csv and loss.png."""
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


if __name__ == "__main__":
    main()
