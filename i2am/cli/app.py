"""``i2am app``."""

from __future__ import annotations

import argparse
import inspect
from typing import TYPE_CHECKING, Any

from i2am.cli.arguments import CALL_OPTIONS, OPTIONS, UserError, add_options, flag, positive
from i2am.cli.images import IMAGE_OPTIONS
from i2am.cli.results import quiet_libraries
from i2am.cli.streams import say

if TYPE_CHECKING:
    from PIL.Image import Image

    from i2am.app import Made, Session

ON_THE_PAGE = {*CALL_OPTIONS.values(), "seed"}  # these are fields there
OF_PIPELINES = [o.name for o in OPTIONS if o.name not in ON_THE_PAGE | {"time_groups", "layers"}]
ZOO = ("exemplar", "superres")
LARGEST = 64  # pixels of what superres enlarges here: 256 come out, in seconds on a laptop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Serves a page on this machine: load a pipeline, give a reference, run, click patches. Without PIPELINE a "
        "small trained model of the zoo, which needs no download."
    )
    parser.add_argument("pipeline", nargs="?", metavar="PIPELINE", help="folder of a saved pipeline, or its hub name")
    parser.add_argument("--zoo", choices=ZOO, help="a small trained model instead (default: exemplar)")
    parser.add_argument("--port", type=positive, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 lets other machines in")
    parser.add_argument("--no-browser", action="store_true", help="do not open one")
    add_options(parser, [option for option in OPTIONS if option.name not in ON_THE_PAGE])


def run(args: argparse.Namespace) -> None:
    """Run the command until it is interrupted."""
    if args.pipeline is not None and args.zoo is not None:
        raise UserError(f"PIPELINE {args.pipeline} and --zoo {args.zoo}: one of them")
    quiet_libraries()
    from i2am import app

    try:
        app.import_gradio()
    except app.MissingGradio as error:
        raise UserError(str(error)) from error
    if args.pipeline is None:
        useless = [flag(o) for o in OF_PIPELINES if getattr(args, o) is not None]
        if useless:
            raise UserError(f"{' and '.join(useless)}: of no use without PIPELINE")
        session = zoo_session(args.zoo or "exemplar", args.time_groups, args.layers)
    else:
        session = pipeline_session(args)
    say(f"Serving {session.title}. Stop with Ctrl-C.")
    try:
        app.serve(session, args.host, args.port, browser=not args.no_browser)
    except OSError as error:
        raise UserError(f"--port: {error}") from error


def pipeline_session(args: argparse.Namespace) -> Session:
    """Load a saved pipeline, with a field on the page for everything that its call takes."""
    from i2am.app import Made, Session
    from i2am.cli.job import Job
    from i2am.cli.pipelines import find_class, images_needed, reference_argument

    pipeline_class = find_class(args.pipeline, args.revision)
    signature = inspect.signature(pipeline_class.__call__).parameters
    values = {option: signature[name].default for name, option in CALL_OPTIONS.items() if name in signature}
    values = {option: None if default is inspect.Parameter.empty else default for option, default in values.items()}
    taken = {reference_argument(pipeline_class, {*signature}, args.ip_adapter is not None)}
    images = {"reference": True} | dict.fromkeys(images_needed({*signature}, taken).values(), True)
    given = (
        dict.fromkeys([*IMAGE_OPTIONS, *CALL_OPTIONS.values(), "seed"])
        | dict.fromkeys(images, "given on the page")
        | values
    )
    given |= {option: "" for option in ("prompt", "negative_prompt") if option in values}
    job = Job.of(argparse.Namespace(**{**vars(args), **given}))
    if job.makes_videos:
        raise UserError(f"{job.name} makes videos, which this page does not show: use i2am trace")
    job.load()

    def run(images: dict[str, Image | None], seed: int, values: dict[str, Any]) -> Made:
        maps, generated, seen = job.run(dict.fromkeys(IMAGE_OPTIONS) | images, seed, values, record="qk")
        assert not isinstance(generated, list)
        return Made(maps, generated, seen)

    return Session(f"{job.name} of {args.pipeline}", images, values, run)


def zoo_session(name: str, time_groups: int = 5, layers: list[str] | None = None) -> Session:
    """Load a model of the zoo, with held-out photographs as examples where scikit-image brings them.

    Args:
        name: one of ZOO.
        time_groups, layers: as in :func:`i2am.trace`; layers None: the finest of the decoder, which do the transfer.
    """
    import torch

    import i2am
    from i2am import zoo
    from i2am.app import Made, Session
    from i2am.demo import one_thread

    pipe, size = zoo.load(name), zoo.data.SIZE
    inpaints = name != "superres"
    if layers is None:
        layers = [zoo.finest_layers(pipe.unet.attn_processors)]

    def run(images: dict[str, Image | None], seed: int, values: dict[str, Any]) -> Made:
        given = {option: picture.convert("RGB") for option, picture in images.items() if picture is not None}
        if inpaints:
            given = {option: picture.resize((size, size)) for option, picture in given.items()}
            inputs = {"image": given["image"], "mask_image": given["mask"], "reference": given["reference"]}
        else:
            inputs = {"image": _small(given["reference"])}
        generator = torch.Generator().manual_seed(seed)
        steps = values.get("steps", 10)
        with one_thread(), i2am.trace(pipe, time_groups=time_groups, layers=layers, record="qk") as tracer:
            generated = pipe(**inputs, num_inference_steps=int(steps), generator=generator).images[0]
        return Made(tracer.maps(), generated, inputs["reference" if inpaints else "image"])

    images = {"reference": True} | ({"image": True, "mask": True} if inpaints else {})
    title = f"{name}, a small model of the zoo ({size} px)" if inpaints else "superres, a small model of the zoo (4×)"
    return Session(title, images, {"steps": 10}, run, _examples(name, inpaints))


def _small(picture: Image) -> Image:
    """Return a picture of even sides, LARGEST at most."""
    scale = min(1.0, LARGEST / max(picture.size))
    width, height = (max(round(n * scale) // 2 * 2, 2) for n in picture.size)
    return picture.resize((width, height))


def _examples(name: str, inpaints: bool) -> list[list[Image | None]]:
    from i2am import zoo
    from i2am.zoo.pipelines import as_images

    try:
        tasks = zoo.samples(name, 3, seed=0)
    except zoo.MissingPhotographs:
        return []
    columns = [as_images(tasks.reference)]
    if inpaints:
        columns += [as_images(tasks.scene), as_images(tasks.mask.expand(-1, 3, -1, -1) * 2 - 1)]
    return [list(row) for row in zip(*columns, strict=True)]
