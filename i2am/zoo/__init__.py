"""Small image-to-image diffusion models, really trained, on tasks whose true answer is known: what claims rest on.

::

    pipe = i2am.zoo.load("exemplar")          # a diffusers pipeline, 64×64 px
    task = i2am.zoo.samples("exemplar", 1)    # held-out photographs, and the truth
    with i2am.trace(pipe) as tracer:
        picture = pipe(task.picture, task.mask, task.reference).images[0]

How the shipped weights were made, on one thread of a CPU (a run goes on where it was stopped; it is bounded by
processor time, so another machine ends a little elsewhere)::

    python -m i2am.zoo.train inpainting --minutes 70 --rate 2e-3    # one model for both tasks: exemplar and tryon
    python -m i2am.zoo.train superres --minutes 45 --rate 7e-4 --start LARGE               # what bicubic lacks
    python -m i2am.zoo.train superres --minutes 30 --rate 7e-4 --start THAT --places      # its places, kept

exemplar and tryon attend from 2-px cells to 2-px patches and start on 32-px pictures; in the first part of the run
they are told where the object's cells should look (:mod:`.flow`). Where the other cells look is left to them: at
corners of the reference, which are sinks. superres is told all along, or its neighbours' patches serve nearly as well.
Between its two runs lay two shorter ones of the same kind; each file's facts list the runs that it came from.

``superres-large`` is version 0.1's, 6,789 steps in 62 minutes by its trainer, never told where to look. Its last layer
looks at the right patch for 99, 97 and 92 % of all cells at 256, 512 and 1024 px (the other: 95 and 77 % at 256 and
512), but its pictures are noisy: two dB further from the truth (``docs/evidence.md``).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from i2am.zoo.data import MissingPhotographs, Sample, samples
from i2am.zoo.pipelines import ReferenceInpaintingPipeline, SuperResolutionPipeline, ZooPipeline
from i2am.zoo.storage import read

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("exemplar", "tryon", "superres")
VARIANTS = {"superres": ("large",)}

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


def load(name: str, variant: str | None = None) -> ZooPipeline:
    """Load a trained model as a diffusers pipeline, float32 on CPU, ready to run, trace, move and save.

    Args:
        name: "exemplar" (an object put into a scene), "tryon" (a garment moved, scaled, turned and bent into a scene;
            takes a pose) or "superres" (4× each way).
        variant: "large" of superres: a model whose attention finds its places in pictures up to 1024 px, at the price
            of noisier ones; the other is for pictures, or tiles, up to 256 px.

    Raises:
        ValueError: no such model, or no such variant of it.
    """
    if name not in NAMES:
        raise ValueError(f"the zoo has {', '.join(NAMES)}, not {name!r}")
    if variant not in (None, *VARIANTS.get(name, ())):
        known = ", ".join(map(repr, VARIANTS.get(name, ()))) or "none"
        raise ValueError(f"{name} has no variant {variant!r}; its variants: {known}")
    return read(WEIGHTS / f"{name if variant is None else f'{name}-{variant}'}.safetensors")[0]


def finest_layers(names: Iterable[str]) -> str:
    """Return the pattern of the finest decoder layers among ``names`` of attention layers, for ``layers=``."""
    return f"up_blocks.{max(int(name.split('.')[1]) for name in names if name.startswith('up_blocks.'))}.*"
