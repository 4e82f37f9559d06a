"""Small image-to-image diffusion models, really trained, on tasks whose true answer is known: what claims rest on.

::

    pipe = i2am.zoo.load("exemplar")          # a diffusers pipeline, 64×64 px
    task = i2am.zoo.samples("exemplar", 1)    # held-out photographs, and the truth
    with i2am.trace(pipe) as tracer:
        picture = pipe(task.picture, task.mask, task.reference).images[0]

How the shipped weights were made, on one thread of a CPU (a run goes on where it was stopped; it is bounded by
processor time, so another machine ends a little elsewhere)::

    python -m i2am.zoo.train inpainting --minutes 70 --rate 2e-3    # one model for both tasks: exemplar and tryon
    python -m i2am.zoo.train superres --minutes 62                  # by version 0.1's trainer, in 6,789 steps

exemplar and tryon attend from 2-px cells to 2-px patches and start on 32-px pictures; in the first part of the run
they are told where the object's cells should look (:mod:`.flow`), which superres never was. Where the other cells look
is left to them: at corners of the reference, which are sinks.

Today's trainer makes a superres of residuals that enlarges 2 dB better, and better than bicubic in the mean of eight;
but on pictures of 512 px a third of its cells look at another place, which the shipped one does not, so it waits::

    python -m i2am.zoo.train superres --minutes 45 --rate 7e-4 --start i2am/zoo/weights/superres.safetensors
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from i2am.zoo.data import MissingPhotographs, Sample, samples
from i2am.zoo.pipelines import ReferenceInpaintingPipeline, SuperResolutionPipeline, ZooPipeline
from i2am.zoo.storage import read

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("exemplar", "tryon", "superres")

__all__ = [
    "NAMES",
    "MissingPhotographs",
    "ReferenceInpaintingPipeline",
    "Sample",
    "SuperResolutionPipeline",
    "ZooPipeline",
    "finest_layers",
    "load",
    "samples",
]


def load(name: str) -> ZooPipeline:
    """Load a trained model as a diffusers pipeline, float32 on CPU, ready to run, trace, move and save.

    Args:
        name: "exemplar" (an object put into a scene), "tryon" (a garment moved, scaled, turned and bent into a scene;
            takes a pose) or "superres" (4× each way, at any size up to 1024 px).

    Raises:
        ValueError: no such model.
    """
    if name not in NAMES:
        raise ValueError(f"the zoo has {', '.join(NAMES)}, not {name!r}")
    return read(WEIGHTS / f"{name}.safetensors")[0]


def finest_layers(names: Iterable[str]) -> str:
    """Return the pattern of the finest decoder layers among ``names`` of attention layers, for ``layers=``."""
    return f"up_blocks.{max(int(name.split('.')[1]) for name in names if name.startswith('up_blocks.'))}.*"
