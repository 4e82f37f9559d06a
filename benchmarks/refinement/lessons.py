"""What a model is told beside its own loss: the conditions that are compared, and the shipped losses they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import i2am
from i2am import losses
from i2am.tracing.probe import LayerRead
from i2am.zoo import Sample, ZooPipeline
from i2am.zoo.flow import true_places

QUIET = 0.3  # noise levels below which a picture's colours are still to be seen
Score = Callable[[LayerRead, Sample, Tensor], Tensor]  # one layer's read-outs, the task, which images count [B]


def flow(read: LayerRead, sample: Sample, counts: Tensor) -> Tensor:
    """Score the expected place against the known source, in tokens."""
    places, inside = known_places(read, sample)
    return losses.flow(read.expected, places, mass=read.mass, weight=inside * counts[:, None])


def inside(read: LayerRead, sample: Sample, counts: Tensor) -> Tensor:
    """Score R2G inside the mask that is to be painted: nothing else is known."""
    mask = F.adaptive_avg_pool2d(sample.mask, read.grid).flatten(1)
    return losses.inside(read.r2g[counts > 0], mask[counts > 0])


def photometric(read: LayerRead, sample: Sample, counts: Tensor) -> Tensor:
    """Score the reference, warped by the expected places, against the true picture."""
    assert read.key_grid is not None
    _, there = known_places(read, sample)
    reference = F.adaptive_avg_pool2d(sample.reference, read.key_grid)
    picture = F.adaptive_avg_pool2d(sample.picture, read.grid)
    weight = there * counts[:, None]
    return losses.photometric(read.expected, reference, picture, size=read.key_grid, mass=read.mass, weight=weight)


def known_places(read: LayerRead, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return true sources ``[B, Q, 2]`` in reference tokens, and which queries lie on the object ``[B, Q]``."""
    assert read.key_grid is not None
    places, there = true_places(sample, sample.picture.shape[-1] // read.grid[0])
    return places / (sample.reference.shape[-1] / read.key_grid[0]) - 0.5, there


@dataclass(frozen=True)
class Lesson:
    """A loss on attention, and when it counts."""

    score: Score
    reads: tuple[str, ...]
    weight: float
    layers: str | None = None  # pattern; None: every layer that attends to the reference
    below: float = 1.0  # noise levels (share of all) at which it counts
    first: float = float("inf")  # steps after which it is left out

    def counts(self, level: Tensor, step: int) -> Tensor:
        """Return which images count, ``[B]`` in 0…1."""
        return ((level <= self.below) & (step < self.first)).float()


PLACES = ("expected", "mass")
LESSONS: dict[str, Lesson | None] = {
    "plain": None,
    "flow": Lesson(flow, PLACES, 0.01),
    "inside": Lesson(inside, ("r2g",), 0.1),
    "photometric": Lesson(photometric, PLACES, 0.5),
    "photometric, gated": Lesson(photometric, PLACES, 0.5, below=QUIET),
    "flow, a tenth": Lesson(flow, PLACES, 0.001),
    "flow, encoder": Lesson(flow, PLACES, 0.01, layers="down_blocks.*"),
    "flow, decoder": Lesson(flow, PLACES, 0.01, layers="up_blocks.*"),
    "flow, 400 steps": Lesson(flow, PLACES, 0.01, first=400),
}


def reference_of(pipe: ZooPipeline, size: int) -> i2am.Reference:
    """Return where a zoo pipeline's reference of ``size`` px is: every token but the one that means "nothing"."""
    return i2am.Reference(grid=pipe.image_encoder.grid(size, size), tokens=slice(1, None))


def told(lesson: Lesson, reads: list[LayerRead], sample: Sample, counts: Tensor) -> Tensor:
    """Return the weighted mean over layers of what a lesson says; 0 where it says nothing of any image."""
    scores = []
    for read in reads:
        if lesson.score is not inside:
            counts = counts * (known_places(read, sample)[1].sum(1) > 0)
        if counts.any():
            scores.append(lesson.score(read, sample, counts))
    return lesson.weight * torch.stack(scores).mean() if scores else torch.zeros(())
