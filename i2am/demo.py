"""What ``i2am demo`` runs: a small trained try-on model of the zoo on held-out photographs, offline, in seconds.

The garment of the reference is cut from a photograph the model never saw; the true source of every pixel is known, so
the maps can be checked by eye: R2G should lie on the garment in the picture, G2R on the garment of the reference. Only
the finest decoder layers are traced: in this model they do the transfer, and the coarser ones do not localise it
(docs/evidence.md).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from i2am.zoo.data import MissingPhotographs, Sample

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from i2am.maps import AttributionMaps

__all__ = ["NOTE", "SIZE", "MissingPhotographs", "one_thread", "run", "task"]

MODEL = "tryon"
LAYERS = "up_blocks.1.*"
NOTE = "A small trained model (i2am.zoo, 64 px), its finest decoder layers: R2G should lie on the garment it painted."
TASK = 18  # which held-out garment and scene
SIZE = 256  # pixels that the 64-px pictures are enlarged to, to be looked at


@contextmanager
def one_thread():
    """torch on one thread: a model this small loses more to threads waiting for each other (10× on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(steps: int = 20, seed: int = 0, time_groups: int = 5) -> tuple[AttributionMaps, Image, Image]:
    """Paints a garment into a scene, traced.

    Args:
        steps: denoising steps.
        seed: of the initial noise; the task is always the same.
        time_groups: as in :func:`i2am.trace`.

    Returns:
        ``(maps, generated, reference)``, the pictures enlarged to SIZE.

    Raises:
        MissingPhotographs: scikit-image, which brings the photographs, is not there.
    """
    import i2am
    from i2am import zoo

    sample = task()
    pipe = zoo.load(MODEL)
    with i2am.trace(pipe, time_groups=time_groups, layers=LAYERS) as tracer:
        generated = pipe(
            image=sample.picture,
            mask_image=sample.mask,
            reference=sample.reference,
            pose=sample.pose,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
    return tracer.maps(), enlarged(generated[0] * 2 - 1), enlarged(sample.reference[0])


def task() -> Sample:
    """The scene, mask, reference and truth of the demo: held-out photographs, read from scikit-image's own folder."""
    from i2am import zoo

    return zoo.samples(MODEL, 1, seed=TASK)


def enlarged(x: Tensor) -> Image:
    """``[3, h, w]`` in [-1, 1] as a picture of SIZE pixels."""
    from PIL import Image

    pixels = ((x + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.BICUBIC)
