"""The ``i2am`` command: ``demo`` and ``trace``.

What is wrong with the user's input ends as one sentence on stderr and exit code 2; anything else is a bug and keeps its
traceback. Heavy packages are imported where they are used, so that ``i2am --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import i2am

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from i2am.maps import AttributionMaps

SETTINGS = "i2am.json"  # lists the files of a run, by which a later one knows its own
OWN_FILES = re.compile(
    r"(generated|reference|summary|[utlh]lam_(r2g|g2r)(_\d+_heads)?)\.png|maps\.safetensors|i2am\.json"
)
DPI = 150
DTYPES = ("float32", "float16", "bfloat16")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "owner/name" or "name": not a path
IMAGE_OPTIONS = {"reference": "RGB", "image": "RGB", "mask": "L", "control_image": "RGB"}


class UserError(Exception):
    """Something about the input that the user can put right; the message is one sentence."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after the program's name; None: the process's own.

    Returns:
        exit code: 0; 2 for wrong input (one sentence on stderr); 130 after Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        print("i2am: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("i2am: interrupted", file=sys.stderr)
        return 130
    except SystemExit as done:  # --help and --version
        return done.code or 0
    return 0


# ------------------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage first."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="i2am", description="What did an image-to-image diffusion model take from its reference?")
    parser.add_argument("--version", action="version", version=f"i2am {i2am.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands.add_parser("demo", help="trace a small pipeline on photographs, offline, in under a minute"))
    _add_trace(commands.add_parser("trace", help="run a diffusers pipeline and map what it took from a reference"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)
    parser.description = "Traces a small, randomly initialised inpainting pipeline with an image prompt."
    parser.add_argument("--out", type=Path, default=Path("i2am-demo"), metavar="DIR", help="default: ./i2am-demo")
    parser.add_argument("--steps", type=_positive, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of the initial noise (default: 0)")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_trace)
    parser.description = "Runs a diffusers pipeline once, traced, and writes its image, maps and figures."
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a saved diffusers pipeline, or its hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")

    images = parser.add_argument_group("images")
    images.add_argument("--reference", type=Path, required=True, metavar="FILE", help="the reference image")
    images.add_argument("--image", type=Path, metavar="FILE", help="the image to paint in or to start from")
    images.add_argument("--mask", type=Path, metavar="FILE", help="white where to paint")
    images.add_argument("--control-image", type=Path, metavar="FILE", help="a ControlNet's input")

    adapter = parser.add_argument_group("IP-Adapter (text-to-image pipelines take their reference through one)")
    adapter.add_argument("--ip-adapter", metavar="REPO_OR_DIR", help="hub name or folder")
    adapter.add_argument("--ip-adapter-weight", metavar="NAME", help="weight file; not needed if the folder has one")
    adapter.add_argument("--ip-adapter-subfolder", metavar="S", help="where in it the weight file lies")
    adapter.add_argument("--ip-adapter-scale", type=float, metavar="X", help="strength (default: 1)")

    run = parser.add_argument_group("the run (what is left out is the pipeline's own default)")
    run.add_argument("--prompt", metavar="TEXT", help="default: empty, where the pipeline takes one")
    run.add_argument("--negative-prompt", metavar="TEXT")
    run.add_argument("--steps", type=_positive, metavar="N", help="denoising steps")
    run.add_argument("--guidance-scale", type=float, metavar="G")
    run.add_argument("--size", type=_size, metavar="HxW", help="height x width in pixels, multiples of 8")
    run.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: 0")
    run.add_argument("--device", type=_device, metavar="D", help="default: cuda where there is one, else cpu")
    run.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, else float16")

    maps = parser.add_argument_group("the maps")
    maps.add_argument("--time-groups", type=_positive, default=5, metavar="T", help="default: 5")
    maps.add_argument("--layers", action="append", metavar="GLOB", help='such as "up_blocks.*"; may be repeated')


def _positive(text: str) -> int:
    number = int(text) if re.fullmatch(r"\d+", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    size = tuple(int(n) for n in match.groups()) if match else (0, 0)
    if not all(n > 0 and n % 8 == 0 for n in size):
        raise argparse.ArgumentTypeError(f"{text!r} is not a height x width in multiples of 8, such as 512x384")
    return size


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: {reason}") from error


# ------------------------------------------------------------------------------------------------------------ demo


def _demo(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    _claim(args.out)
    _quiet(warnings_too=True)  # they would be about the demo's own parts
    from i2am import demo

    print(demo.NOTE)
    settings = {"command": "demo", "weights": "random", "steps": args.steps, "seed": args.seed}
    with demo.one_thread():
        try:
            maps, generated, reference = demo.run(args.steps, args.seed)
        except demo.MissingPhotographs as error:
            raise UserError(str(error)) from error
        write_results(args.out, maps, generated, reference, settings, footer=demo.NOTE)
    print(f"{time.perf_counter() - start:.0f} s")


# ----------------------------------------------------------------------------------------------------------- trace


def _trace(args: argparse.Namespace) -> None:
    images = {option: _open(option, getattr(args, option), mode) for option, mode in IMAGE_OPTIONS.items()}
    _fit(images, args.size)
    _check_adapter(args)
    _quiet()
    pipeline_class = _pipeline_class(args.pipeline)
    name, parameters = pipeline_class.__name__, set(inspect.signature(pipeline_class.__call__).parameters)
    routes = route(name, parameters, args)
    _claim(args.out)
    pipe = _load(pipeline_class, args)

    call: dict[str, Any] = {"generator": torch.Generator().manual_seed(args.seed)}
    if "prompt" in parameters:
        call["prompt"] = ""
    if args.size is not None and "height" in parameters:
        call["height"], call["width"] = args.size
    call |= {argument: images.get(option, getattr(args, option)) for argument, option in routes.items()}
    try:
        with i2am.trace(pipe, time_groups=args.time_groups, layers=args.layers) as tracer:
            result = pipe(**call)
        maps = tracer.maps()
    except (ValueError, i2am.BlindLayerError) as error:
        raise UserError(f"{name}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name}: out of memory on {pipe.device}; try a smaller --size, or --dtype float16") from error
    seen = part_seen(images["reference"], pipe)
    if seen.size != images["reference"].size:
        print(f"the image encoder sees the central {seen.width}×{seen.height} pixels of the reference: reference.png")
    write_results(args.out, maps, result.images[0], seen, _settings(args, name))


def route(name: str, parameters: set[str], args: argparse.Namespace) -> dict[str, str]:
    """Which argument of a pipeline's call gets which option of the command line.

    Args:
        name: class name of the pipeline, for messages.
        parameters: names that its ``__call__`` takes.
        args: the options; None where one was not given.

    Returns:
        ``{argument of the call: option}``.

    Raises:
        UserError: an input that the pipeline needs is missing, or an option was given that it does not take.
    """
    routes = {_reference_argument(name, parameters, args): "reference"}
    controlled = "controlnet_conditioning_scale" in parameters and "control_image" not in parameters
    needed = {
        "image": "control_image" if controlled else "image",
        "mask_image": "mask",
        "control_image": "control_image",
    }
    for argument, option in needed.items():
        if argument in parameters and argument not in routes:
            if getattr(args, option) is None:
                raise UserError(f"{name} needs {_flag(option)}")
            routes[argument] = option
    optional = {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "guidance_scale": "guidance_scale",
        "num_inference_steps": "steps",
    }
    routes |= {a: option for a, option in optional.items() if a in parameters and getattr(args, option) is not None}

    options = [*IMAGE_OPTIONS, *optional.values()]
    unused = [_flag(o) for o in options if getattr(args, o) is not None and o not in routes.values()]
    if args.ip_adapter is not None and "ip_adapter_image" not in routes:
        unused.append("--ip-adapter")
    if args.size is not None and "height" not in parameters and not {"image", "control_image"} & {*routes.values()}:
        unused.append("--size")
    if unused:
        raise UserError(f"{name} takes no {' and no '.join(unused)}")
    return routes


def _reference_argument(name: str, parameters: set[str], args: argparse.Namespace) -> str:
    if "num_frames" in parameters:
        raise UserError(f"{name} makes videos, which i2am does not trace")
    if "example_image" in parameters:
        return "example_image"
    if "ip_adapter_image" in parameters:
        if args.ip_adapter is None:
            raise UserError(f"{name} takes a reference through an IP-Adapter only: give --ip-adapter")
        return "ip_adapter_image"
    if "image" in parameters and not parameters & {"prompt", "mask_image"}:
        return "image"
    raise UserError(f"{name} takes no reference image that i2am could trace")


def _pipeline_class(pipeline: str) -> type[DiffusionPipeline]:
    """The class of a saved pipeline, read before any weights."""
    import diffusers

    if not Path(pipeline).is_dir() and not HUB_NAME.fullmatch(pipeline):
        raise UserError(f"PIPELINE: there is no folder {pipeline}")
    try:
        config = diffusers.DiffusionPipeline.load_config(pipeline)
    except (OSError, ValueError) as error:
        if Path(pipeline).is_dir():
            raise UserError(f"PIPELINE: {pipeline} is not a saved diffusers pipeline: {error}") from error
        raise UserError(
            f"PIPELINE: {pipeline} is neither a folder nor a hub repository within reach: {error}"
        ) from error
    name = config.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None:
        raise UserError(f"PIPELINE: {pipeline} is a {name}, which diffusers {diffusers.__version__} does not have")
    return _loadable(pipeline_class, config)


def _loadable(pipeline_class: type[DiffusionPipeline], config: dict[str, Any]) -> type[DiffusionPipeline]:
    """``pipeline_class``, such that it loads although diffusers has retired it.

    diffusers (0.42) moved old pipelines, Paint-by-Example among them, to ``pipelines.deprecated``, and there its loader
    does not find the classes that come with a pipeline: neither as published checkpoints name them
    (``["paint_by_example", "PaintByExampleImageEncoder"]``) nor as it writes them itself (``["diffusers", …]``).
    """
    import diffusers

    package = pipeline_class.__module__.rpartition(".")[0]
    if not package.startswith("diffusers.pipelines.deprecated."):
        return pipeline_class
    name, own = package.rpartition(".")[2], importlib.import_module(package)
    setattr(diffusers.pipelines, name, own)

    def found(part):
        misplaced = isinstance(part, list) and part[0] == "diffusers" and not hasattr(diffusers, part[1])
        return [name, part[1]] if misplaced and hasattr(own, part[1]) else part

    repaired = {key: found(part) for key, part in config.items()}
    load_config = classmethod(lambda cls, *args, **kwargs: dict(repaired))
    return type(pipeline_class.__name__, (pipeline_class,), {"load_config": load_config})


def _load(pipeline_class: type[DiffusionPipeline], args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline on its device, with its IP-Adapter."""
    from safetensors import SafetensorError

    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16"))
    try:
        with warnings.catch_warnings():  # the name that every diffusers 0.x takes; the newer ones prefer "dtype"
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipe = pipeline_class.from_pretrained(args.pipeline, torch_dtype=dtype)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"PIPELINE: {args.pipeline} does not load: {error}") from error
    if args.ip_adapter is not None:
        try:
            pipe.load_ip_adapter(
                args.ip_adapter, subfolder=args.ip_adapter_subfolder or "", weight_name=args.ip_adapter_weight
            )
        except (
            OSError,
            ValueError,
            KeyError,
            RuntimeError,
            SafetensorError,
        ) as error:  # the last three: another model's
            raise UserError(
                f"--ip-adapter: {args.ip_adapter_weight} of {args.ip_adapter} does not fit {type(pipe).__name__}: "
                f"{type(error).__name__}: {error}"
            ) from error
        pipe.set_ip_adapter_scale(1.0 if args.ip_adapter_scale is None else args.ip_adapter_scale)
    return pipe.to(device)


def _check_adapter(args: argparse.Namespace) -> None:
    """Refuses an IP-Adapter that is not there, and finds its weight file where the folder has only one."""
    if args.ip_adapter is None:
        for option in ("ip_adapter_weight", "ip_adapter_subfolder", "ip_adapter_scale"):
            if getattr(args, option) is not None:
                raise UserError(f"{_flag(option)} is of no use without --ip-adapter")
        return
    if not Path(args.ip_adapter).is_dir():
        if not HUB_NAME.fullmatch(args.ip_adapter):
            raise UserError(f"--ip-adapter: there is no folder {args.ip_adapter}")
        if args.ip_adapter_weight is None:
            raise UserError("--ip-adapter-weight is needed with an IP-Adapter of the hub")
        return
    folder = Path(args.ip_adapter, args.ip_adapter_subfolder or "")
    if not folder.is_dir():
        raise UserError(f"--ip-adapter-subfolder: there is no folder {folder}")
    weights = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt"))
    if args.ip_adapter_weight is None:
        if len(weights) != 1:
            raise UserError(f"--ip-adapter-weight is needed: {folder} has {', '.join(weights) or 'no weight file'}")
        args.ip_adapter_weight = weights[0]
    if not (folder / args.ip_adapter_weight).is_file():
        raise UserError(f"--ip-adapter-weight: there is no file {folder / args.ip_adapter_weight}")


def _open(option: str, path: Path | None, mode: str) -> Image | None:
    from PIL import Image, ImageOps

    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"{_flag(option)}: there is no file {path}")
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{_flag(option)}: {path} cannot be read as an image: {error}") from error


def _fit(images: dict[str, Image | None], size: tuple[int, int] | None) -> None:
    """Brings the input images to one size, in place: the one asked for, else the image's own in multiples of 8.

    Not the reference: its encoder has a size of its own.
    """
    from PIL.Image import Resampling

    inputs = [option for option in ("image", "control_image", "mask") if images[option] is not None]
    if not inputs:
        return
    width, height = images[inputs[0]].size
    height, width = size or (max(height // 8, 1) * 8, max(width // 8, 1) * 8)
    for option in inputs:
        resampling = Resampling.NEAREST if option == "mask" else Resampling.LANCZOS
        if images[option].size != (width, height):
            images[option] = images[option].resize((width, height), resampling)


def part_seen(reference: Image, pipe) -> Image:
    """The part of a reference that the pipeline's image encoder sees, and that the G2R maps lie on.

    CLIP's image processors scale the shorter side and cut out the centre; others scale the whole image.
    """
    processor = getattr(pipe, "feature_extractor", None) or getattr(pipe, "image_feature_extractor", None)
    shorter = (getattr(processor, "size", None) or {}).get("shortest_edge")
    if not shorter or not getattr(processor, "do_center_crop", False):
        return reference
    scale = min(reference.size) / shorter
    width, height = (
        min(round(processor.crop_size[side] * scale), n)
        for side, n in zip(("width", "height"), reference.size, strict=True)
    )
    left, top = (reference.width - width) // 2, (reference.height - height) // 2
    return reference.crop((left, top, left + width, top + height))


def _settings(args: argparse.Namespace, pipeline_class: str) -> dict[str, Any]:
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("run", "out")}
    readable = {k: v if isinstance(v, (int, float, str, list, tuple)) else str(v) for k, v in given.items()}
    return {"command": "trace", "pipeline_class": pipeline_class, **readable}


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------- results


def write_results(
    out: Path,
    maps: AttributionMaps,
    generated: Image,
    reference: Image,
    settings: dict[str, Any],
    footer: str | None = None,
) -> None:
    """Writes a run: its images, figures of every level in both directions, maps, and settings with versions.

    Pictures of an earlier run in ``out`` are removed first, so that none is left that this run does not have.

    Args:
        out: an existing folder.
        maps: of one image and one reference.
        generated: what the pipeline made.
        reference: the part of the reference that its encoder saw.
        settings: JSON values; versions are added.
        footer: a note below every figure.
    """
    for name in _written_before(out):
        (out / name).unlink(missing_ok=True)
    files = {"generated.png": generated, "reference.png": reference}
    directions = {"r2g": generated, "g2r": reference}
    try:
        maps.ulam("g2r")
    except ValueError as error:
        print(error)
        del directions["g2r"]
    figures = {f"{name}.png": draw for name, draw in _figures(maps, generated, reference, directions, footer)}
    names = [*files, *figures, "maps.safetensors"]
    document = {**settings, "layers": maps.layers, "reference_name": maps.references[0], **_versions(), "files": names}
    (out / SETTINGS).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, image in files.items():
        image.save(out / name)
    for name, draw in figures.items():
        draw().savefig(out / name, dpi=DPI)
    maps.save(out / "maps.safetensors")
    print(f"wrote {', '.join(names)} and {SETTINGS} to {out}")


def _figures(
    maps: AttributionMaps, generated: Image, reference: Image, directions: dict[str, Image], footer: str | None
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(name, function that draws it) of each figure of a run."""
    from i2am import plot

    def unified(direction: str, image: Image) -> Figure:
        ax = plot.overlay(image, maps.ulam(direction), title=f"ULAM · {plot.MEANING[direction]}")
        return plot.note(ax.figure, footer) if footer else ax.figure

    yield "summary", partial(plot.summary, maps, generated, reference, footer=footer)
    for direction, image in directions.items():
        draw = partial(plot.levels, maps, direction, image, footer=footer)
        yield f"ulam_{direction}", partial(unified, direction, image)
        yield f"tlam_{direction}", partial(draw, "time")
        for suffix, layers in _head_groups(maps).items():
            yield f"hlam_{direction}{suffix}", partial(draw, "head", layers=layers)
        yield f"llam_{direction}", partial(draw, "layer")


def _head_groups(maps: AttributionMaps) -> dict[str, list[str]]:
    """Layers that share a head count, by a suffix for their picture: empty where all do (SDXL: 10 and 20)."""
    groups: dict[int, list[str]] = {}
    heads = maps.heads()
    for layer in maps.layers:
        groups.setdefault(heads[layer], []).append(layer)
    return {f"_{heads}_heads" if len(groups) > 1 else "": layers for heads, layers in groups.items()}


def _versions() -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers")
    return {
        "versions": {"i2am": i2am.__version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
    }


def _claim(out: Path) -> None:
    """Makes the folder ``out``, and refuses one whose files a run would overwrite although i2am did not write them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        own = _written_before(out)
        foreign = sorted(p.name for p in out.iterdir() if OWN_FILES.fullmatch(p.name) and p.name not in own)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out: cannot write to {out}: {error.strerror}") from error
    if foreign:
        raise UserError(f"--out: {out} has files that i2am did not write, and would overwrite: {', '.join(foreign)}")


def _written_before(out: Path) -> list[str]:
    """Names of the files that an earlier run wrote to ``out``, as its settings list them."""
    try:
        listed = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {out / SETTINGS} was not written by i2am") from error
    return [name for name in (SETTINGS, *listed) if isinstance(name, str) and OWN_FILES.fullmatch(name)]


def _quiet(warnings_too: bool = False) -> None:
    """Hushes hints on installation and the bars for loading: the one progress bar is that of the denoising steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    if warnings_too:
        diffusers_logging.set_verbosity_error()
