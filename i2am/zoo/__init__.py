"""Small image-to-image diffusion models, really trained, on tasks whose true answer is known: what claims rest on.

::

    pipe = i2am.zoo.load("exemplar")          # a diffusers pipeline, 64×64 px
    task = i2am.zoo.samples("exemplar", 1)    # held-out photographs, and the truth
    with i2am.trace(pipe) as tracer:
        picture = pipe(task.picture, task.mask, task.reference).images[0]

The shipped weights were made by the trainer of version 0.1, ``python -m i2am.zoo.train NAME --minutes 46 --seed 0``,
beside other work on two cores, in 1,575 and 1,601 steps; superres with ``--minutes 62``, 6,789 steps, of which the last
17 minutes were resumed with more tokens from elsewhere than planned at first. A run is bounded by time, so another
machine ends a little elsewhere.

The trainer has learned since: superres diffuses what a plain enlargement lacks; exemplar and tryon attend from 2-px
cells to 2-px patches, start on 32-px pictures and are told where to look in the first part of the run (:mod:`.flow`).
Its commands, for weights to come (single-threaded; each goes on where it was stopped)::

    python -m i2am.zoo.train superres --minutes 180 --rate 7e-4 --start i2am/zoo/weights/superres.safetensors
    python -m i2am.zoo.train inpainting --minutes 180 --rate 2e-3
    python -m i2am.zoo.train tryon --minutes 30 --start zoo-training/inpainting/inpainting.safetensors
    python -m i2am.zoo.train exemplar --minutes 30 --start zoo-training/inpainting/inpainting.safetensors
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
