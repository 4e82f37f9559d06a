"""Pipelines by name: their class before any weights, which input goes where, and loading."""

from __future__ import annotations

import argparse
import importlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from i2am.cli.arguments import UserError, flag
from i2am.cli.images import IMAGE_OPTIONS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

IN_CONTEXT = re.compile("FluxKontext|Flux2|QwenImageEdit|LongCatImageEdit")  # the image edited is the reference
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "owner/name" or "name": not a path


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
                raise UserError(f"{name} needs {flag(option)}")
            routes[argument] = option
    optional = {
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "guidance_scale": "guidance_scale",
        "num_inference_steps": "steps",
    }
    routes |= {a: option for a, option in optional.items() if a in parameters and getattr(args, option) is not None}

    options = [*IMAGE_OPTIONS, *optional.values()]
    unused = [flag(o) for o in options if getattr(args, o) is not None and o not in routes.values()]
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
    if IN_CONTEXT.match(name) and args.ip_adapter is None:
        return "image_reference" if "image_reference" in parameters else "image"
    if "example_image" in parameters:
        return "example_image"
    if "ip_adapter_image" in parameters:
        if args.ip_adapter is None:
            raise UserError(f"{name} takes a reference through an IP-Adapter only: give --ip-adapter")
        return "ip_adapter_image"
    if "image" in parameters and not parameters & {"prompt", "mask_image"}:
        return "image"
    raise UserError(f"{name} takes no reference image that i2am could trace")


def find_class(pipeline: str) -> type[DiffusionPipeline]:
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


def load_pipeline(pipeline_class: type[DiffusionPipeline], args: argparse.Namespace) -> DiffusionPipeline:
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


def check_adapter(args: argparse.Namespace) -> None:
    """Refuses an IP-Adapter that is not there, and finds its weight file where the folder has only one."""
    if args.ip_adapter is None:
        for option in ("ip_adapter_weight", "ip_adapter_subfolder", "ip_adapter_scale"):
            if getattr(args, option) is not None:
                raise UserError(f"{flag(option)} is of no use without --ip-adapter")
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
