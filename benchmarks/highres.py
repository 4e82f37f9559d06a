"""``python -m benchmarks.highres``: a large super-resolution traced on a CPU, with its time and its peak memory.

The zoo's large ``superres`` was trained on at most 128 px; here it enlarges a photograph it never saw to 1024 px,
where the finest attention has 65,536 queries and 16,385 keys a head. Written: overlays of R2G and G2R, SRAM of four
places, and a table of sizes. Nothing of a traced run's memory grows as the attention does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from tqdm import tqdm

import i2am
from benchmarks.memory import Memory
from i2am import plot, zoo
from i2am.zoo import data
from i2am.zoo.encoder import centres
from i2am.zoo.storage import read

PHOTOGRAPH = "chelsea.png"  # held out in training
SHARP = "up_blocks.1.attentions.1.*"  # the layers that localise (docs/evidence.md)
# (y, x) shares of the picture
PLACES = {"eye": (0.37, 0.32), "nose": (0.81, 0.64), "brow": (0.16, 0.5), "whiskers": (0.86, 0.16)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.highres", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="pixels of the outputs (default 1024)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (default 2)")
    parser.add_argument("--aligned", action="store_true", help="only: how many tokens look at the aligned patch")
    parser.add_argument("--weights", type=Path, help="a superres.safetensors instead of the shipped one")
    parser.add_argument("--out", type=Path, default=Path("results/highres"))
    args = parser.parse_args(argv)
    if args.aligned:
        for size in args.size:
            share = aligned(size, args.weights)
            print(f"{size} px: the strongest patch is the aligned one for {share:.1%} of all tokens")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in args.size:
        for traced in (False, True):  # each in a process of its own, so that peaks don't mix
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(enlarge, (size, args.steps, traced, args.weights, args.out)))
            print(describe(rows[-1]))
    (args.out / "highres.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"written to {args.out}")


def enlarge(size: int, steps: int, traced: bool, weights: Path | None, out: Path) -> dict:
    """One run; returns what it took, and writes its pictures when it was traced."""
    pipe, image = load(weights), photograph(size // data.FACTOR)
    with tqdm(total=steps, desc=f"{size} px, {'traced' if traced else 'not traced'}") as bar:

        def step_end(pipe, step, timestep, state):
            bar.update()
            return state

        options = dict(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt")
        options |= dict(callback_on_step_end=step_end)
        start = time.perf_counter()
        with Memory() as memory:
            if traced:
                places = {name: (y * size, x * size) for name, (y, x) in PLACES.items()}
                with i2am.trace(pipe, sram=places) as tracer:
                    picture = pipe(image, **options).images
            else:
                picture = pipe(image, **options).images
    row = {"size": size, "steps": steps, "traced": traced, "seconds": time.perf_counter() - start, "peak": memory.peak}
    queries, keys = (size // 4) ** 2, (size // 8) ** 2 + 1
    row |= {"queries": queries, "keys": keys, "matrix": 4 * queries * keys * 4}
    if traced:
        maps = tracer.maps()
        row["sram"] = {name: distance(maps, name) for name in PLACES}
        maps.save(out / f"maps-{size}.safetensors")
        draw(maps, (image[0] + 1) / 2, picture[0], size).savefig(out / f"highres-{size}.png", dpi=110)
    return row


def aligned(size: int, weights: Path | None) -> float:
    """Share of the finest tokens whose strongest patch, in the last layer, is the one at their own place; one step."""
    pipe, small = load(weights), photograph(size // data.FACTOR)
    with i2am.trace(pipe, record="qk", layers=f"{SHARP}attn2") as tracer:
        pipe(small, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    best = tracer.maps().match().best[0]  # [h, w, 2], in patches
    truth = centres(best.shape[:2], pipe.image_encoder.grid(*small.shape[-2:])[0] / best.shape[0])
    return float(((best - truth).abs().amax(-1) < 0.5).float().mean())


def load(weights: Path | None) -> zoo.ZooPipeline:
    return zoo.load("superres", "large") if weights is None else read(weights)[0]


def photograph(side: int) -> torch.Tensor:
    """``[1, 3, side, side]``: the middle of the photograph, enlarged or reduced to that size."""
    image = data.photograph(PHOTOGRAPH)
    square = min(image.shape[1:])
    top, left = ((n - square) // 2 for n in image.shape[1:])
    image = image[None, :, top : top + square, left : left + square]
    return torch.nn.functional.interpolate(image, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def distance(maps: i2am.AttributionMaps, name: str) -> float:
    """Pixels of the picture from a place to the strongest reference patch of its SRAM, in the layers that localise."""
    sram = maps.sram(name, layers=SHARP)[0]
    side, (y, x) = sram.shape[-1], PLACES[name]
    best = divmod(int(sram.argmax()), side)
    pixels = maps.canvas[0] / side
    return float(((best[0] + 0.5 - y * side) ** 2 + (best[1] + 0.5 - x * side) ** 2) ** 0.5 * pixels)


def describe(row: dict) -> str:
    what = "traced" if row["traced"] else "not traced"
    text = (
        f"{row['size']} px, {row['steps']} steps, {what}: {row['seconds']:.0f} s, peak +{row['peak'] / 2**30:.2f} GiB"
    )
    text += f"; one layer's attention would be {row['matrix'] / 2**30:.1f} GiB"
    text += f" (4 heads × {row['queries']:,} × {row['keys']:,} in float32)"
    if "sram" in row:
        text += "; SRAM's best patch is " + ", ".join(f"{d:.0f} px from the {n}" for n, d in row["sram"].items())
    return text


def draw(maps: i2am.AttributionMaps, small: torch.Tensor, picture: torch.Tensor, size: int) -> Figure:
    """The picture and the small one, R2G and G2R over them, and SRAM of each place."""
    columns = 2 + (len(PLACES) + 1) // 2
    figure = Figure(figsize=(3.5 * columns, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns)
    axes[0, 0].imshow(small.permute(1, 2, 0), interpolation="nearest")
    axes[0, 0].set_title(f"reference, {small.shape[-1]} px")
    axes[1, 0].imshow(picture.permute(1, 2, 0))
    axes[1, 0].set_title(f"generated, {size} px")
    plot.overlay(small, maps.ulam("g2r", normalize="lift"), axes[0, 1], title="G2R (lift)")
    plot.overlay(picture, maps.ulam("r2g", normalize="lift"), axes[1, 1], title="R2G (lift)")
    for ax, (name, (y, x)) in zip(axes[:, 2:].flat, PLACES.items(), strict=False):
        plot.overlay(small, maps.sram(name, layers=SHARP), ax, title=f"SRAM of the {name}", colorbar=False)
        side = small.shape[-1]
        ax.add_patch(Circle((x * side, y * side), side / 14, fill=False, ec="cyan", lw=1.2))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_visible(bool(ax.images))
    return figure


if __name__ == "__main__":
    main()
