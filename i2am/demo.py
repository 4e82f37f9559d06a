"""What ``i2am demo`` runs: a small trained try-on model of the zoo on held-out photographs, offline, in seconds.

The garment of the reference is cut from a photograph the model never saw; the true source of every pixel is known, so
the maps can be checked by eye: R2G should lie on the garment in the picture, and what the painted part took on the
garment of the reference. G2R over the whole picture is another matter: cells that need no reference still have to look
somewhere, and look at its corners (docs/reading.md, sinks).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from i2am.zoo.data import MissingPhotographs, Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor

    from i2am.maps import AttributionMaps

__all__ = ["NOTE", "SIZE", "MissingPhotographs", "findings", "one_thread", "run", "story", "task"]

MODEL = "tryon"
NOTE = "A small try-on model (i2am.zoo, 64 px) paints a shirt, cut from a photograph, into a scene."
TASK = 18  # which held-out garment and scene: a shirt with a cat's eye on one sleeve, laid on gravel
SPOT = (20, 54)  # (y, x) of the 64-px picture: in that eye
SIZE = 256  # pixels that the 64-px pictures are enlarged to, to be looked at


@contextmanager
def one_thread():
    """Run torch on one thread: threads that wait for each other cost a small model more (10× on a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(steps: int = 20, seed: int = 0, time_groups: int = 5) -> tuple[AttributionMaps, Image, Image]:
    """Paint a garment into a scene, traced; queries and keys are kept, so that any patch can be asked afterwards.

    Args:
        steps: denoising steps.
        seed: of the initial noise; the task is always the same.
        time_groups: as in :func:`i2am.trace`.

    Returns:
        ``(maps, generated, reference)``, the pictures enlarged to SIZE; the garment as :func:`on_white`.

    Raises:
        MissingPhotographs: scikit-image, which brings the photographs, is not there.
    """
    import i2am
    from i2am import zoo

    sample = task()
    pipe = zoo.load(MODEL)
    with i2am.trace(pipe, time_groups=time_groups, record="qk") as tracer:
        generated = pipe(
            image=sample.picture,
            mask_image=sample.mask,
            reference=sample.reference,
            pose=sample.pose,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
    return tracer.maps(), enlarged(generated[0] * 2 - 1), on_white(sample)


def task() -> Sample:
    """Return the scene, mask, reference and truth of the demo: photographs from scikit-image's own folder."""
    from i2am import zoo

    return zoo.samples(MODEL, 1, seed=TASK)


def masks() -> dict[str, Image]:
    """Return what was to be painted (``mask``) and where the garment is on its reference (``reference_mask``)."""
    sample = task()
    found = {"mask": sample.mask, "reference_mask": sample.reference_object}
    return {name: enlarged(x[0].expand(3, -1, -1) * 2 - 1).convert("L") for name, x in found.items()}


def on_white(sample: Sample) -> Image:
    """Return the reference as a cut-out. The model saw it on a plain colour, which hides the garment's outline."""
    inside = 1 - torch.nn.functional.max_pool2d(1 - sample.reference_object, 3, 1, 1)  # without the mixed edge
    return enlarged((sample.reference * inside + (1 - inside))[0])


def enlarged(x: Tensor) -> Image:
    """Return ``[3, h, w]`` in [-1, 1] as a picture of SIZE pixels."""
    from PIL import Image

    from i2am.zoo.pipelines import as_images

    return as_images(x[None])[0].resize((SIZE, SIZE), Image.BICUBIC)


def findings(maps: AttributionMaps) -> list[str]:
    """Return what the maps say of this run, in sentences, each beside the truth that the demo knows."""
    import i2am

    sample, r2g, g2r = task(), maps.ulam("r2g"), maps.ulam("g2r")
    taken, shirt = maps.sram(sample.mask[0, 0]), sample.reference_object[0, 0]
    scores = [i2am.imacs(r2g[0], sample.mask[0, 0]).item(), i2am.imacs(taken[0], shirt).item()]
    on_shirt = [share_inside(x[0], shirt) for x in (taken, g2r)]
    y, x = np.unravel_index(int(r2g[0].argmax()), r2g.shape[1:])
    cell = sample.object.shape[-1] // r2g.shape[-1]
    on_it = bool(sample.object[0, 0, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].any())
    (found, true), patch = source(maps), sample.reference.shape[-1] // maps.sram(SPOT).shape[-1]
    off = float(np.hypot(*np.subtract(found, true)))
    return [
        f"R2G is strongest {'on' if on_it else 'beside'} the painted garment.",
        f"Of what the painted part took, {on_shirt[0]:.0%} lies on the shirt (G2R over the whole picture: "
        f"{on_shirt[1]:.0%},",
        "      since cells that need no reference look elsewhere).",
        f"IMACS {scores[0]:+.2f} (R2G, painted part), {scores[1]:+.2f} (what that part took, shirt): above 0, strong",
        "      values lie inside more than outside; 0 does not care, 1 is the most, -3 lies wholly outside.",
        f"SRAM of the eye on the sleeve: strongest {off:.1f} px off the true source; a patch has {patch} px.",
    ]


def share_inside(map: Tensor, mask: Tensor) -> float:
    """Return the share of ``map [h, w]`` that lies inside ``mask [H, W]``."""
    inside = torch.nn.functional.adaptive_avg_pool2d(mask[None], tuple(map.shape))[0]
    return ((map * inside).sum() / map.sum()).item()


def source(maps: AttributionMaps) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return where SPOT came from, ``(y, x)`` in pixels of the reference: by SRAM's strongest patch, and in truth."""
    sram, sample = maps.sram(SPOT)[0], task()
    patch = sample.reference.shape[-1] / sram.shape[-1]
    y, x = np.unravel_index(int(sram.argmax()), tuple(sram.shape))
    truth = sample.source[0, SPOT[0], SPOT[1]]
    return ((y + 0.5) * patch, (x + 0.5) * patch), (truth[0].item(), truth[1].item())


def story(maps: AttributionMaps, generated: Image, reference: Image) -> Figure:
    """Draw the demo in six panels: reference, scene, picture; then G2R of the painted part, R2G and SRAM."""
    from matplotlib.figure import Figure

    from i2am.plot.arrays import as_picture
    from i2am.plot.panels import CMAP, bare, draw

    sample = task()
    scene = enlarged(sample.scene[0] + sample.mask[0])  # what is to be painted is white
    figure = Figure(figsize=(9.6, 6.7), layout="constrained")
    axes = figure.subplots(2, 3)
    titles = ("Reference: a shirt", "Scene: the white part is to be painted", "Generated: the shirt, moved and bent")
    for ax, image, title in zip(axes[0], (reference, scene, generated), titles, strict=True):
        bare(ax).imshow(image)
        ax.set_title(title, fontsize=9)
    shown = (
        ("g2r", reference, maps.sram(sample.mask[0, 0], normalize="lift"), "G2R of the white part: what was used"),
        ("r2g", generated, maps.ulam("r2g", normalize="lift"), "R2G: where the shirt was used"),
        ("sram", reference, maps.sram(SPOT, normalize="lift"), "SRAM: where the circled patch came from"),
    )
    for ax, (_, image, map, title) in zip(axes[1], shown, strict=True):
        values = map[0].numpy()
        heat = draw(ax, as_picture(image, 0), values, CMAP, 0.65, float(values.min()), float(values.max()))
        bar = figure.colorbar(heat, ax=ax, fraction=0.046, pad=0.02)
        bar.set_label("attention, times its average", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.solids.set_alpha(1)
        ax.set_title(title, fontsize=9)
    scale = SIZE / sample.picture.shape[-1]
    ring(axes[0, 2], [(n + 0.5) * scale for n in SPOT], "o")
    ring(axes[1, 2], [n * scale for n in source(maps)[1]], "+")
    axes[1, 2].set_xlabel("+ the true source", fontsize=9)
    figure.suptitle("What did the model take from its reference?", fontsize=13)
    return figure


def ring(ax, place, marker: str) -> None:
    """Mark ``place`` as ``(y, x)``, white on black."""
    for colour, width in (("black", 3.4), ("white", 1.6)):
        ax.plot(
            place[1], place[0], marker, ms=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width
        )
