"""``i2am trace``."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am.cli.arguments import UserError, add_options, flag, nbytes, positive
from i2am.cli.images import IMAGE_OPTIONS, open_image, part_seen
from i2am.cli.results import prepare_output_dir, quiet_libraries, write_results
from i2am.cli.streams import say

if TYPE_CHECKING:
    from PIL.Image import Image

    from i2am.cli.job import Job, Outcome

NOT_SHOWN = ("run", "out", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Runs a diffusers pipeline once, traced, and writes its image, maps and figures."
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a saved diffusers pipeline, or its hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")

    images = parser.add_argument_group("images")
    images.add_argument(
        "--reference",
        type=Path,
        required=True,
        action="append",
        metavar="FILE",
        help="the reference image; may be repeated where the pipeline or an IP-Adapter takes several",
    )
    images.add_argument("--image", type=Path, metavar="FILE", help="the image to paint in or to start from")
    images.add_argument("--mask", type=Path, metavar="FILE", help="white where to paint")
    images.add_argument("--control-image", type=Path, metavar="FILE", help="a ControlNet's input")
    add_options(parser)

    report = parser.add_argument_group("the report")
    report.add_argument("--report", action="store_true", help="also write report.html, in which patches can be clicked")
    report.add_argument("--reference-mask", type=Path, metavar="FILE", help="white on the reference's object")
    report.add_argument("--record-every", type=positive, default=1, metavar="N", help="patches of every N-th step only")
    report.add_argument("--record-limit", type=nbytes, default="2GB", metavar="SIZE", help="for patches (default: 2GB)")


def run(args: argparse.Namespace) -> None:
    """Run the command: everything that can be refused is refused before weights are read."""
    first, *more = args.reference
    args.reference, args.more_references = first, more or None
    images = {option: open_image(flag(option), getattr(args, option), mode) for option, mode in IMAGE_OPTIONS.items()}
    others = [open_image("--reference", path, "RGB") for path in more]
    reference_mask = open_image("--reference-mask", args.reference_mask, "L")
    if reference_mask is not None and not args.report:
        raise UserError("--reference-mask is of no use without --report")
    if reference_mask is not None and more:
        raise UserError("--reference-mask is of one reference, and there are several")
    quiet_libraries()
    from i2am.cli.job import Job

    job = Job.of(args)
    if job.makes_videos and reference_mask is not None:
        raise UserError(f"--reference-mask scores a picture, and {job.name} makes videos")
    prepare_output_dir(args.out)
    job.load()
    maps, generated, seen = _traced(job, images, others, args)
    if seen.size != images["reference"].size:
        say(f"the image encoder sees the central {seen.width}×{seen.height} pixels of the reference: reference.png")
    masks = None
    if args.report:
        reference_mask = job.as_seen(reference_mask, images["reference"], generated)
        masks = {"mask": images["mask"], "reference_mask": reference_mask}
    every = [seen, *(part_seen(other, job.pipe, generated) for other in others)]
    write_results(args.out, maps, generated, every, shown_settings(args, job.name), masks=masks)


def _traced(job: Job, images: dict[str, Image | None], others: list[Image], args: argparse.Namespace) -> Outcome:
    import torch

    import i2am

    recorded = {"record": "qk", "record_every": args.record_every, "record_limit": args.record_limit}
    try:
        return job.run(images, args.seed, others=others, **(recorded if args.report else {}))
    except (ValueError, i2am.BlindLayerError) as error:
        raise UserError(f"{job.name}: {error}") from error
    except NameError as error:  # pipelines leave out the import of a package that is not there
        if not error.name or find_spec(error.name) is not None:
            raise
        raise UserError(f"{job.name} needs the package {error.name}, which is not installed") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.name}: out of memory on {job.device}; try a smaller --size, --offload model, or --dtype float16"
        ) from error


def shown_settings(args: argparse.Namespace, pipeline_class: str) -> dict[str, Any]:
    """Return the given options as JSON values."""
    given = {k: v for k, v in vars(args).items() if v is not None and k not in NOT_SHOWN}
    if given.get("more_references"):
        given["reference"] = [str(path) for path in (given["reference"], *given.pop("more_references"))]
    readable = {k: v if isinstance(v, (int, float, str, list, tuple)) else str(v) for k, v in given.items()}
    return {"command": "trace", "pipeline_class": pipeline_class, **readable}
