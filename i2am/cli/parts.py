"""Parts of a pipeline from elsewhere: a ControlNet, a motion adapter, an image encoder in a folder of their own."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from i2am.cli.arguments import UserError
from i2am.cli.pipelines import HUB_NAME, first_line, is_folder

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """A part of a pipeline, found before its weights are read."""

    name: str  # argument of the pipeline's class
    place: str  # folder or hub repository
    subfolder: str  # in it, or ""
    kind: type[Any]


def part_folder(name: str, place: str) -> Path | None:
    """Return the local folder of a part's weights: ``place``, or the one in a pipeline's; None: it is of the hub."""
    if not is_folder(place):
        return None
    own = Path(place)
    return own if (own / "config.json").is_file() else own / name


def find_parts(pipeline_class: type, args: argparse.Namespace) -> list[Part]:
    """Find the class of every ``--part``.

    Raises:
        UserError: the pipeline has no such part, or there is none in that place.
    """
    known = set(inspect.signature(pipeline_class).parameters)
    found: list[Part] = []
    for name, place in args.part or ():
        if name not in known:
            raise UserError(f"--part: {pipeline_class.__name__} has no {name}; it has {', '.join(sorted(known))}")
        if name in (part.name for part in found):
            raise UserError(f"--part: {name} is given twice")
        found.append(_find(name, place))
    return found


def load_parts(parts: list[Part], dtype: torch.dtype) -> dict[str, Any]:
    """Read the weights of parts, by name.

    Raises:
        UserError: they do not load.
    """
    from safetensors import SafetensorError

    loaded = {}
    for part in parts:
        options = {"subfolder": part.subfolder} if part.subfolder else {}
        try:
            loaded[part.name] = part.kind.from_pretrained(part.place, torch_dtype=dtype, **options)
        except (OSError, ValueError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(
                f"--part: {part.name} of {part.place} does not load: {type(error).__name__}: {first_line(error)}"
            ) from error
    return loaded


def _find(name: str, place: str) -> Part:
    import diffusers
    import transformers
    from torch import nn

    if not is_folder(place) and not HUB_NAME.fullmatch(place):
        raise UserError(f"--part: there is no folder {place}")
    for subfolder in ("", name):
        try:
            config = diffusers.AutoModel.load_config(place, subfolder=subfolder or None)
        except (OSError, ValueError, RecursionError):
            continue
        for library in (diffusers, transformers):
            for kind in (_class_of(library, named) for named in _classes_in(config)):
                if isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained"):
                    return Part(name, place, subfolder, kind)
    raise UserError(
        f"--part: {place} holds no {name}: neither its config.json nor that of a folder {name} in it names a class of "
        "diffusers or transformers"
    )


def _classes_in(config: Any) -> list[str]:
    """Return names of classes in the configuration of a model of diffusers or of transformers."""
    if not isinstance(config, dict):
        return []
    several = config.get("architectures")
    found = [config.get("_class_name"), *(several if isinstance(several, list) else ())]
    return [name for name in found if isinstance(name, str)]


def _class_of(library: Any, name: str) -> Any:
    """Return what a library calls ``name``; None: nothing, or nothing that can be imported here."""
    try:
        return getattr(library, name, None)
    except (ImportError, RuntimeError):
        return None
