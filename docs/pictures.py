"""The pictures of these pages: ``python -m docs.pictures`` (the report's needs a Chromium)."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

import i2am
from i2am import compare, plot, zoo
from i2am.evaluate import Sample, Store, Traced, evaluate, summarise
from tests.helpers.browser import chromium

IMAGES = Path(__file__).parent / "images"
SHOWN = 8  # of the held-out samples


def main() -> None:
    pipe, tasks = zoo.load("tryon"), zoo.samples("tryon", 12)
    parts = [type(tasks)(*(x if x is None else x[i : i + 1] for x in tasks)) for i in range(12)]
    draw_figures(pipe, parts[SHOWN])
    draw_datasets(pipe, parts)


def traced(pipe, part, steps=None, **options):
    """(maps, generated image, reference in 0…1)."""
    with i2am.trace(pipe, **options) as tracer:
        more = {} if steps is None else {"num_inference_steps": steps}
        image = pipe(
            part.picture, part.mask, part.reference, part.pose, generator=torch.Generator().manual_seed(0), **more
        ).images[0]
    return tracer.maps(), image, (part.reference[0] + 1) / 2


def draw_figures(pipe, part) -> None:
    maps, image, reference = traced(pipe, part, record="qk")
    few, other, _ = traced(pipe, part, steps=4)
    write(plot.levels(maps, "r2g", image, "time"), "time")
    write(plot.levels(maps, "g2r", reference, "layer", columns=6), "layers")
    write(plot.side_by_side(maps, few, "r2g", [image, other], names=("10 steps", "4 steps")), "compared")
    middle = part.mask[0, 0].nonzero().float().mean(0)
    point = tuple(round(x) for x in middle.tolist())
    plot.sram(maps, point, image, reference).savefig(IMAGES / "sram.png", dpi=110)
    draw_report(maps, image, reference, part, point)


def draw_report(maps, image, reference, part, point) -> None:
    """The page after a click at a point."""
    with TemporaryDirectory() as folder, chromium() as browser:
        masks = {"mask": part.mask[0, 0], "reference_mask": part.reference_object[0, 0]}
        title = "Try-on: a garment bent into a scene"
        path = maps.report(Path(folder, "report.html"), image, reference, title=title, **masks)
        page = browser.new_page(viewport={"width": 1200, "height": 775}, color_scheme="light")
        page.goto(path.as_uri())
        stage = page.locator(".stage").first
        box, (height, width) = stage.bounding_box(), maps.canvas
        stage.click(position={"x": point[1] / width * box["width"], "y": point[0] / height * box["height"]})
        page.mouse.move(2, 2)
        page.wait_for_timeout(300)
        page.screenshot(path=Path(folder, "report.png"))
        Image.open(Path(folder, "report.png")).save(IMAGES / "report.webp", quality=90)


def draw_datasets(pipe, parts) -> None:
    """Two evaluations of other step counts, and their comparison."""
    samples = [Sample(id=f"garment-{i:02d}", seed=0) for i in range(len(parts))]
    with TemporaryDirectory() as folder:
        runs = [Path(folder, name) for name in ("10 steps", "3 steps")]
        for out, steps in zip(runs, (10, 3), strict=True):
            store = Store(out)
            store.open({"command": "evaluate", "steps": steps})
            evaluate(samples, lambda sample, steps=steps: run(pipe, parts[int(sample.id[-2:])], steps), store)
            summarise(samples, store)
        few = sorted(Store(runs[0]).records(samples), key=lambda r: -r["imacs_r2g"])
        summarise([s for s in samples if s.id in {r["id"] for r in [*few[:3], *few[-3:]]}], Store(runs[0]))
        sheet = Image.open(runs[0] / "contact.png").convert("RGB")
        sheet.resize((750, round(sheet.height * 750 / sheet.width)), Image.Resampling.LANCZOS).save(
            IMAGES / "contact.webp", quality=85
        )
        found = compare.compare(*runs)
        found.a.path, found.b.path = (Path(run.name) for run in runs)
        write(compare.overview(found), "comparison")


def run(pipe, part, steps: int) -> Traced:
    maps, image, reference = traced(pipe, part, steps=steps)
    return Traced(maps, image, reference, mask=part.mask[0, 0], reference_mask=part.reference_object[0, 0])


def write(figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.webp", dpi=150, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
