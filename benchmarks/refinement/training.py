"""Training runs that differ in one loss: the same weights at first, the same tasks, noise and noise levels."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import i2am
from benchmarks.evidence.subject import SEED, masked_error, true_places
from benchmarks.refinement.lessons import LESSONS, reference_of, told
from i2am import metrics, zoo
from i2am.zoo import data
from i2am.zoo.pipelines import FOLD, build

WARM_UP = 60  # steps
NOISY = 2.0  # noise levels are drawn from 1 - u², as in the zoo's own training
KNOWN = 0.1  # weight of the loss where the picture is given
ALONG = (100, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, 5000)  # steps after which a run is measured
FEW = 48  # held-out tasks of a measurement along the way; the last ones take all
SAVED = 100  # steps between checkpoints


class OutOfTime(Exception):
    """The minutes that were given are over; what was done is kept."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and how; ``room`` names its folder."""

    room: str
    task: str = "exemplar"
    size: int = 32  # pixels of a picture and of a reference
    batch: int = 8
    rate: float = 1e-3  # constant after the warm-up: one run then serves every number of steps
    decay: float = 0.99  # of the averaged weights, which are measured
    shipped: bool = False  # whether it starts from the shipped weights
    fine: bool = True  # attention to 2-px patches from 2-px cells; False: 4-px patches, in a UNet of three levels
    steps: int = 4  # of a measured picture
    samples: int = 208

    def pipeline(self, seed: int) -> zoo.ZooPipeline:
        return zoo.load(self.task) if self.shipped else build(self.task, seed, fine=self.fine)


class Run:
    """One training run under a plan, a condition and a seed; goes on where its files end."""

    def __init__(self, plan: Plan, condition: str, seed: int, state: Path):
        self.plan, self.condition, self.seed = plan, condition, seed
        self.folder = state / plan.room
        self.name = f"{stem(condition)}-{seed}"
        self.pipe = plan.pipeline(seed)
        self.model = nn.ModuleDict({"unet": self.pipe.unet, "image_encoder": self.pipe.image_encoder}).train()
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimiser = torch.optim.AdamW(self.model.parameters(), plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.done, self.cpu = 0, 0.0  # steps, seconds
        self.points: list[dict] = json.loads(self.file.read_text()) if self.file.is_file() else []
        if self._checkpoint.is_file():
            self._resume()

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    def train(self, steps: int, until: float) -> None:
        """Train up to a number of steps, measuring along the way. Raises OutOfTime at ``until``, a wall-clock time."""
        for target in sorted({0, steps, *(n for n in ALONG if n < steps)}):
            while self.done < target:
                self.step()
                if time.time() > until:
                    self._save()
                    raise OutOfTime
                if self.done % SAVED == 0:
                    self._save()
            samples = self.plan.samples if target in (0, steps) else min(FEW, self.plan.samples)
            if target == 0 and not self.plan.shipped:
                continue
            known = {p["steps"]: len(p["error"]) for p in self.points}
            if self.done == target and known.get(target, 0) < samples:
                self._measure(samples)
                self._save()

    def step(self) -> None:
        """Take one optimiser step. Draws depend on the seed and the step's number alone."""
        lesson = LESSONS[self.condition]
        sample, level, noise = self._draw()
        start = time.process_time()
        counts = None if lesson is None else lesson.counts(level, self.done)
        told_of = nullcontext()
        if lesson is not None and counts.any():
            reference = reference_of(self.pipe, self.plan.size)
            told_of = i2am.probe(self.pipe.unet, reference=reference, layers=lesson.layers, reads=lesson.reads)
        with told_of as probe:
            loss = self._loss(sample, level, noise)
            total = loss if probe is None else loss + told(lesson, probe.reads, sample, counts)
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate * min(1, (self.done + 1) / WARM_UP)
        self.optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        decay = min(self.plan.decay, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                self.average[n].lerp_(p, 1 - decay)
        self.cpu += time.process_time() - start

    def _draw(self) -> tuple[zoo.Sample, Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, self.done))
        sample = data.TASKS[self.plan.task](data.Cutter("train", rng), self.plan.batch, self.plan.size)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        level = 1 - torch.rand(self.plan.batch, generator=generator) ** NOISY
        return sample, level, torch.randn(F.pixel_unshuffle(sample.picture, FOLD).shape, generator=generator)

    def _loss(self, sample: zoo.Sample, level: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of the velocity, mostly of what is to be painted, as in the zoo's own training."""
        clean, scheduler = F.pixel_unshuffle(sample.picture, FOLD), self.pipe.scheduler
        steps = scheduler.config.num_train_timesteps
        timestep = (level * steps).long().clamp_max(steps - 1)
        noisy, wanted = scheduler.add_noise(clean, noise, timestep), scheduler.get_velocity(clean, noise, timestep)
        prepared = self.pipe.prepare(sample.scene, sample.mask, sample.reference, sample.pose)
        error = (self.pipe.predict(noisy, timestep, prepared) - wanted).square()
        weight = KNOWN + (1 - KNOWN) * F.avg_pool2d(sample.mask, FOLD)
        return (error * weight).sum() / (weight.sum() * error.shape[1])

    def _measure(self, samples: int) -> None:
        trained = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._load(self.average)
        self.model.eval()
        found: dict[str, list[float]] = {}
        for sample in held_out(self.plan, samples):
            for key, values in measured(self.pipe, sample, self.plan.steps).items():
                found.setdefault(key, []).extend(round(x, 5) for x in values.tolist())
        self._load(trained)
        self.model.train()
        self.points = [p for p in self.points if p["steps"] != self.done]
        self.points.append({"steps": self.done, "cpu": round(self.cpu, 2)} | found)
        self.points.sort(key=lambda p: p["steps"])
        write(self.file, json.dumps(self.points))

    def _load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(weights[n])

    # -------------------------------------------------------------------------------------------------------- files

    @property
    def _checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = dict(model=self.model.state_dict(), average=self.average, optimiser=self.optimiser.state_dict())
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state | dict(done=self.done, cpu=self.cpu), partial)
        os.replace(partial, self._checkpoint)

    def _resume(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.done, self.cpu = state["average"], state["done"], state["cpu"]


def held_out(plan: Plan, samples: int) -> Iterator[zoo.Sample]:
    """Yield batches of 16 tasks on photographs that are never trained on; the same for every run."""
    for i in range(-(-samples // 16)):
        cutter = data.Cutter("held-out", np.random.default_rng(SEED + i), recolour=False)
        yield data.TASKS[plan.task](cutter, 16, plan.size)


def measured(pipe: zoo.ZooPipeline, sample: zoo.Sample, steps: int) -> dict[str, Tensor]:
    """Paint, and return what each picture and its maps are worth, ``[B]`` each; distances in pixels."""
    size = sample.picture.shape[-1]
    noise = torch.Generator().manual_seed(SEED)
    with i2am.patch_unet(pipe.unet, reference=reference_of(pipe, size), num_steps=steps, record="qk") as tracer:
        pictures = pipe.denoise(pipe.prepare(sample.scene, sample.mask, sample.reference, sample.pose), steps, noise)
    maps = tracer.maps()
    match = maps.match()
    truth = true_places(sample, tuple(match.best.shape[1:3]))
    token = size / pipe.image_encoder.grid(size, size)[0]
    found = {
        "error": masked_error(torch.where(sample.mask > 0, pictures.clamp(-1, 1), sample.picture), sample),
        "imacs r2g": metrics.imacs(maps.ulam("r2g"), sample.mask[:, 0]),
        "imacs g2r": metrics.imacs(maps.ulam("g2r"), sample.reference_object[:, 0]),
    }
    for name, places in (("sram", match.best), ("place", match.expected)):
        found[name] = metrics.correspondence_error(places, truth, token).flatten(1).nanmedian(1).values
    return found


def stem(name: str) -> str:
    """Return a condition's or a setting's name as files carry it."""
    return name.replace(", ", "-").replace(" ", "-").replace("-%", "")


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
