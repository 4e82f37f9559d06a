"""Guidance: latents moved against the gradient of an attention loss while a shipped model samples."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import i2am
from benchmarks.evidence.subject import SEED, masked_error
from benchmarks.refinement.lessons import LESSONS, reference_of, told
from benchmarks.refinement.training import OutOfTime, Plan, held_out
from i2am import zoo
from i2am.zoo.pipelines import FOLD, Prepared

SHARES = (0.01, 0.05)  # length of a move, of the latents' own
SETTINGS = {"none": (None, 0.0)} | {
    f"{name}, {100 * share:g} %": (name, share) for name in ("inside", "flow") for share in SHARES
}


def guided(plan: Plan, setting: str, until: float) -> dict[str, list[float]]:
    """Return each held-out task's error on the object under one setting."""
    pipe = zoo.load(plan.task)
    errors: list[float] = []
    for sample in held_out(plan, plan.samples):
        if time.time() > until:
            raise OutOfTime
        prepared = pipe.prepare(sample.scene, sample.mask, sample.reference, sample.pose)
        pictures = denoise(pipe, prepared, plan.steps, mover(pipe, sample, *SETTINGS[setting]))
        pictures = torch.where(sample.mask > 0, pictures.clamp(-1, 1), sample.picture)
        errors += [round(x, 5) for x in masked_error(pictures, sample).tolist()]
    return {"error": errors}


def mover(pipe: zoo.ZooPipeline, sample: zoo.Sample, name: str | None, share: float) -> Callable[..., Tensor]:
    """Return what latents become before a step: moved downhill on a loss, by a share of their own length."""
    if name is None:
        return lambda latents, timestep, prepared: latents
    lesson = LESSONS[name]
    assert lesson is not None
    reference = reference_of(pipe, sample.picture.shape[-1])
    counts = torch.ones(len(sample.picture))

    def move(latents: Tensor, timestep: Tensor, prepared: Prepared) -> Tensor:
        latents = latents.detach().requires_grad_(True)
        with torch.enable_grad(), i2am.probe(pipe.unet, reference=reference, reads=lesson.reads) as probe:
            pipe.predict(latents, timestep, prepared)
            (slope,) = torch.autograd.grad(told(lesson, probe.reads, sample, counts), latents)
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-12)
        step = share * latents.detach().flatten(1).norm(dim=1) / length
        return latents.detach() - step[:, None, None, None] * slope

    return move


@torch.no_grad()
def denoise(pipe: zoo.ZooPipeline, prepared: Prepared, steps: int, move: Callable[..., Tensor]) -> Tensor:
    """Sample as the zoo's pipelines do, from the same noise in every setting, with a move before each step."""
    shape = (len(prepared.channels), pipe.unet.config.out_channels, *prepared.channels.shape[-2:])
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        latents = move(latents, timestep, prepared)
        velocity = pipe.predict(latents, timestep, prepared)
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return F.pixel_shuffle(latents, FOLD)
