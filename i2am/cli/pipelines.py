"""Pipelines by name: their class before any weights, which input goes where, and loading."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from i2am.cli.arguments import CALL_OPTIONS, UserError, flag
from i2am.cli.images import IMAGE_OPTIONS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "owner/name" or "name": not a path
WEIGHT_FILES = (".safetensors", ".bin", ".pt")
VIDEOS = {"num_frames", "num_videos_per_prompt", "segment_frame_length"}  # arguments of pipelines that make videos
OTHER_INPUTS = ("video", "conditions", "reference_conditions", "pose_video", "conditioning_frames")  # no single picture


def route(pipeline_class: type, parameters: set[str], args: argparse.Namespace) -> dict[str, str]:
    """Find which argument of a pipeline's call gets which option of the command line.

    Args:
        pipeline_class: the pipeline's.
        parameters: names that its ``__call__`` takes.
        args: the options; None where one was not given.

    Returns:
        ``{argument of the call: option}``.

    Raises:
        UserError: an input that the pipeline needs is missing, or an option was given that it does not take.
    """
    name = pipeline_class.__name__
    routes = {reference_argument(pipeline_class, parameters, args.ip_adapter is not None): "reference"}
    for argument, option in images_needed(parameters, {*routes}).items():
        if getattr(args, option) is None:
            raise UserError(f"{name} needs {flag(option)}")
        routes[argument] = option
    given = {a: option for a, option in CALL_OPTIONS.items() if getattr(args, option) is not None}
    given |= {} if args.mask is None else {"mask": "mask"}  # what some that are edited by words take beside them
    routes |= {argument: option for argument, option in given.items() if argument in parameters}
    _check_required(pipeline_class, routes)

    options = [*IMAGE_OPTIONS, *CALL_OPTIONS.values()]
    unused = [flag(o) for o in options if getattr(args, o) is not None and o not in routes.values()]
    if args.ip_adapter is not None and "ip_adapter_image" not in routes:
        unused.append("--ip-adapter")
    if args.size is not None and "height" not in parameters and not {"image", "control_image"} & {*routes.values()}:
        unused.append("--size")
    if unused:
        raise UserError(f"{name} takes no {' and no '.join(unused)}")
    return routes


def makes_videos(parameters: set[str]) -> bool:
    """Tell whether a pipeline whose call takes ``parameters`` makes videos."""
    return bool(parameters & VIDEOS)


def _check_required(pipeline_class: type, routes: dict[str, str]) -> None:
    """Refuse a pipeline that cannot do without something else than pictures and words."""
    taken = inspect.signature(pipeline_class.__call__).parameters
    missing = [n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    missing = [name for name in missing if name not in routes and name != "prompt"]
    if not {"image", "image_reference", "reference_images"} & {*routes}:  # it draws over a video, or follows one
        missing += [name for name in ("video", "conditioning_frames") if name in taken and name not in missing]
    if missing:
        raise UserError(
            f"{pipeline_class.__name__} needs {' and '.join(missing)}, which this command does not give: "
            "use i2am.trace in Python"
        )


def images_needed(parameters: set[str], taken: set[str]) -> dict[str, str]:
    """Find the pictures beside the reference that a pipeline's call wants: ``{argument: option}``.

    Args:
        parameters: names that the call takes.
        taken: of these, what something else gives.
    """
    controlled = "controlnet_conditioning_scale" in parameters and "control_image" not in parameters
    wanted = {
        "image": "control_image" if controlled else "image",
        "mask_image": "mask",
        "control_image": "control_image",
    }
    return {argument: option for argument, option in wanted.items() if argument in parameters - taken}


def reference_argument(pipeline_class: type, parameters: set[str], adapted: bool) -> str:
    """Name the argument of a pipeline's call that takes the reference.

    Args:
        pipeline_class: the pipeline's.
        parameters: names that its ``__call__`` takes.
        adapted: an IP-Adapter will be loaded.

    Raises:
        UserError: none does, or none that i2am traces.
    """
    from i2am.families import registry

    name = pipeline_class.__name__
    if adapted and "ip_adapter_image" not in parameters:
        raise UserError(f"{name} takes no --ip-adapter")
    try:
        argument = registry.reference_argument(pipeline_class, adapter=adapted)
    except ValueError as error:
        hint = ": give --ip-adapter" if "ip_adapter_image" in parameters and not adapted else ""
        raise UserError(f"{error}{hint}") from error
    if "layers" in parameters:
        raise UserError(f"{name} makes several layers, which this command does not draw: use i2am.trace in Python")
    if argument not in parameters:
        raise UserError(f"{name} takes no --reference: it has no argument {argument}")
    if argument.endswith("_embeds"):
        raise UserError(
            f"{name} takes its reference as {argument}, which another pipeline makes: use i2am.trace in Python"
        )
    if argument in OTHER_INPUTS:
        raise UserError(
            f"{name} takes its reference as {argument}, which is no single picture: use i2am.trace in Python"
        )
    return argument


def is_folder(path: str | Path) -> bool:
    """Return whether a path names a folder; a name that no path can have does not."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def class_name_in(folder: str) -> str | None:
    """Return the name of a saved pipeline's class, read without diffusers; None: only :func:`find_class` can tell."""
    try:
        config = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    name = config.get("_class_name") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def find_class(pipeline: str, revision: str | None = None, given: str | None = None) -> type[DiffusionPipeline]:
    """Find the class of a saved pipeline, before any weights are read.

    Args:
        pipeline: folder or hub name.
        revision: of the hub repository.
        given: name of the class to load it as; None: the one that saved it.

    Raises:
        UserError: there is no such pipeline, or none that this diffusers can run.
    """
    if not is_folder(pipeline) and not HUB_NAME.fullmatch(pipeline):
        raise UserError(f"PIPELINE: there is no folder {pipeline}")
    if is_folder(pipeline) and revision is not None:
        raise UserError(f"--revision is of a hub repository, and {pipeline} is a folder")
    import diffusers  # what is above is said at once

    asked = {} if revision is None else {"revision": revision}
    try:
        config = diffusers.DiffusionPipeline.load_config(pipeline, **asked)
    except (OSError, ValueError, RecursionError) as error:
        if is_folder(pipeline):
            raise UserError(f"PIPELINE: {pipeline} is not a saved diffusers pipeline: {first_line(error)}") from error
        raise UserError(
            f"PIPELINE: {pipeline} is neither a folder nor a hub repository within reach: {first_line(error)}"
        ) from error
    name = given or (config.get("_class_name") if isinstance(config, dict) else None)
    if not isinstance(name, str):
        raise UserError(f"PIPELINE: model_index.json of {pipeline} does not say which pipeline it is (_class_name)")
    try:
        pipeline_class = getattr(diffusers, name, None)
    except (ImportError, RuntimeError) as error:  # imported on first use, and a package that it needs is missing
        raise UserError(f"PIPELINE: {name} cannot be imported: {first_line(error)}") from error
    pipeline_class = _of_zoo(name) if pipeline_class is None else pipeline_class
    if pipeline_class is None and given is not None:
        raise UserError(f"--pipeline-class: diffusers {diffusers.__version__} has no {given}")
    if pipeline_class is None:
        raise UserError(f"PIPELINE: {pipeline} is a {name}, which diffusers {diffusers.__version__} does not have")
    if not isinstance(pipeline_class, type) or not issubclass(pipeline_class, diffusers.DiffusionPipeline):
        raise UserError(f"PIPELINE: {pipeline} is a {name}, which is no pipeline")
    return _loadable(pipeline_class, config)


def _of_zoo(name: str) -> type[DiffusionPipeline] | None:
    """Return the zoo's pipeline class of this name: ``zoo.load(...).save_pretrained(folder)`` is a pipeline, too."""
    from i2am import zoo

    return {kind.__name__: kind for kind in zoo.ZooPipeline.__subclasses__()}.get(name)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _loadable(pipeline_class: type[DiffusionPipeline], config: dict[str, Any]) -> type[DiffusionPipeline]:
    """Return ``pipeline_class`` such that it loads although diffusers has retired it.

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

    def found(part: Any) -> Any:
        match part:
            case ["diffusers", str(kind)] if not hasattr(diffusers, kind) and hasattr(own, kind):
                return [name, kind]
        return part

    repaired = {key: found(part) for key, part in config.items()}
    load_config = classmethod(lambda cls, *args, **kwargs: dict(repaired))
    return type(pipeline_class.__name__, (pipeline_class,), {"load_config": load_config})


def load_pipeline(
    pipeline_class: type[DiffusionPipeline],
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    parts: Mapping[str, Any],
) -> DiffusionPipeline:
    """Read a pipeline's weights, put its adapters on, and place it on its device.

    Args:
        pipeline_class: the pipeline's.
        args: the options.
        device, dtype: where it runs, and in what.
        parts: those that come from elsewhere, by name.

    Raises:
        UserError: weights do not load, or do not fit; names the option.
    """
    from safetensors import SafetensorError

    given = {name: value for name in ("variant", "revision") if (value := getattr(args, name)) is not None}
    try:
        with warnings.catch_warnings():  # the name that every diffusers 0.x takes; the newer ones prefer "dtype"
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipe = pipeline_class.from_pretrained(args.pipeline, torch_dtype=dtype, **given, **parts)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"PIPELINE: {args.pipeline} does not load: {type(error).__name__}: {first_line(error)}"
        ) from error
    if args.ip_adapter is not None:
        _fit("ip_adapter", args.ip_adapter_weight, pipe, _load_adapter, args)
    if args.lora is not None:
        _fit("lora", args.lora, pipe, _load_lora, args)
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _load_adapter(pipe: DiffusionPipeline, args: argparse.Namespace) -> None:
    pipe.load_ip_adapter(args.ip_adapter, subfolder=args.ip_adapter_subfolder or "", weight_name=args.ip_adapter_weight)
    pipe.set_ip_adapter_scale(1.0 if args.ip_adapter_scale is None else args.ip_adapter_scale)


def _load_lora(pipe: DiffusionPipeline, args: argparse.Namespace) -> None:
    pipe.load_lora_weights(args.lora)


def _fit(option: str, what: str, pipe: DiffusionPipeline, load: Any, args: argparse.Namespace) -> None:
    """Load further weights into a pipeline; those of another model are the user's mistake."""
    from safetensors import SafetensorError

    try:
        load(pipe, args)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(
            f"{flag(option)}: {what} of {getattr(args, option)} does not fit {type(pipe).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_adapter(args: argparse.Namespace) -> None:
    """Refuse an IP-Adapter or LoRA that is not there, and find the adapter's weight file where there is only one."""
    if args.lora is not None and not Path(args.lora).exists() and not HUB_NAME.fullmatch(args.lora):
        raise UserError(f"--lora: there is no file or folder {args.lora}")
    if args.ip_adapter is None:
        for option in ("ip_adapter_weight", "ip_adapter_subfolder", "ip_adapter_scale"):
            if getattr(args, option) is not None:
                raise UserError(f"{flag(option)} is of no use without --ip-adapter")
        return
    if not is_folder(args.ip_adapter):
        if not HUB_NAME.fullmatch(args.ip_adapter):
            raise UserError(f"--ip-adapter: there is no folder {args.ip_adapter}")
        if args.ip_adapter_weight is None:
            raise UserError("--ip-adapter-weight is needed with an IP-Adapter of the hub")
        return
    folder = Path(args.ip_adapter, args.ip_adapter_subfolder or "")
    if not is_folder(folder):
        raise UserError(f"--ip-adapter-subfolder: there is no folder {folder}")
    weights = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHT_FILES)
    if args.ip_adapter_weight is None:
        if len(weights) != 1:
            raise UserError(f"--ip-adapter-weight is needed: {folder} has {', '.join(weights) or 'no weight file'}")
        args.ip_adapter_weight = weights[0]
    if not (folder / args.ip_adapter_weight).is_file():
        raise UserError(f"--ip-adapter-weight: there is no file {folder / args.ip_adapter_weight}")
