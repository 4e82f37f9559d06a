"""From a model or a pipeline to its family: the one place that knows them all, each from its own file."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import pkgutil
import sys
from typing import Any, NamedTuple

from torch import nn

import i2am.families
from i2am.families import UNKNOWN, Family, PipelineFacts, Request
from i2am.families.keysets import check_key_sets
from i2am.references import Banked, Concatenated, Reference
from i2am.tracing.intercept import refuse_compiled

# what names of arguments that take pictures contain, and those that contain it and take none
PICTURES = ("image", "video", "frames", "reference", "keyframes", "conditions", "controls")
NUMBERS = ("video_length", "frames", "reference_downscale_factor", "reference_audio", "controls_conditioning_scale")


@functools.cache
def families() -> tuple[type[Family], ...]:
    """Return every family of this folder that names models or pipelines."""
    for module in pkgutil.iter_modules(i2am.families.__path__):
        importlib.import_module(f"i2am.families.{module.name}")
    found, waiting = [], [Family]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        found += [kind for kind in below if "models" in vars(kind) or "pipelines" in vars(kind)]
    return tuple(sorted(found, key=lambda kind: kind.__name__))


def read_model(model: nn.Module, request: Request, *, entry: str) -> Family:
    """Return the family of a model.

    Args:
        model: a diffusion transformer or UNet.
        request: how it is to be read.
        entry: "patch_transformer" or "patch_unet"; the latter also takes UNets that are only built like diffusers'.

    Raises:
        ValueError: its tokens' layout is not known, or the request does not fit; says what to write.
    """
    refuse_compiled(model)
    name = type(model).__name__
    names = [kind.__name__ for kind in type(model).__mro__]  # FSDP2 and PEFT rename classes, and keep the old one
    known = {model_name: family for family in families() for model_name in family.models}
    family = next((known[n] for n in names if n in known), None)
    if family is None and entry == "patch_unet":
        family = known["UNet2DConditionModel"]
    if family is None:
        raise ValueError(
            f"i2am does not know where {name} keeps its reference; it knows {', '.join(sorted(known))}. For attention "
            "modules with to_q, to_k and heads use i2am.patch_modules"
        )
    found = family.read(model, request)
    check_key_sets(found, request)
    return found


def facts_of(kind: type[Any]) -> PipelineFacts | None:
    """Return what is known of a pipeline class: of its own name before those of the classes that it is made from.

    Others' classes may have the name of one of diffusers (PASD's, IDM-VTON's), and work differently.
    """
    every = [facts for family in families() for facts in family.pipelines]
    for name in (base.__name__ for base in kind.__mro__ if not is_namesake(base)):
        fitting = [facts for facts in every if fnmatch.fnmatchcase(name, facts.pattern)]
        if fitting:
            return max(fitting, key=lambda facts: len(facts.pattern))
    return None


def is_namesake(kind: type[Any]) -> bool:
    """Tell whether a class has the name of one of diffusers, and is another's."""
    return not _is_own(kind) and kind.__name__ in dir(sys.modules.get("diffusers"))


def calls_own_code(kind: type[Any]) -> bool:
    """Tell whether a pipeline's call is neither diffusers' nor this package's."""
    return not _is_own(next((base for base in kind.__mro__ if "__call__" in vars(base)), kind))


def _is_own(kind: type[Any]) -> bool:
    return kind.__module__.split(".")[0] in ("diffusers", "i2am")


class Verdict(NamedTuple):
    """Verdict on a pipeline class that takes a picture: how its reference becomes keys, or why it does not."""

    family: type[Family] | None = None  # whose model it runs, where the reference becomes keys
    keys: str | None = None  # weights that the model has then
    adapter: bool = False  # an IP-Adapter gives it keys
    refused: str | None = None  # why there are none otherwise


def verdict_on(kind: type[Any]) -> Verdict | None:
    """Return what is known of a pipeline class; None: nothing, or it takes no picture.

    Args:
        kind: a pipeline class, or what stands for one in diffusers where a package that it needs is not installed.
    """
    facts, parameters = facts_of(kind), call_parameters(kind)
    adapter = "ip_adapter_image" in parameters or bool(facts is not None and facts.adapter)
    if facts is None:
        return Verdict(adapter=True) if adapter and not _pictures(parameters) else None
    if facts.adapter and facts.refused is None:
        return Verdict(adapter=True)
    family = next(family for family in families() if facts in family.pipelines)
    if facts.refused is None:
        return Verdict(family, adapter=adapter)
    return Verdict(family if facts.keys else None, facts.keys, adapter, facts.refused)


def takes_pictures(kind: type[Any]) -> bool:
    """Return whether a pipeline's call takes a picture, a video or an IP-Adapter's image."""
    parameters = call_parameters(kind)
    return bool(_pictures(parameters)) or "ip_adapter_image" in parameters


def reference_argument(kind: type[Any], *, adapter: bool = False) -> str:
    """Return the argument of a pipeline's call that takes the reference image.

    Args:
        kind: class of the pipeline.
        adapter: whether an IP-Adapter is loaded.

    Raises:
        ValueError: its call takes no reference that becomes attention keys, or only through an adapter.
    """
    parameters = call_parameters(kind)
    facts = facts_of(kind)
    known = facts is not None and (facts.refused is None or facts.keys is not None)  # some only with certain weights
    if facts is not None and known and not facts.adapter and not adapter:
        return facts.argument
    if "ip_adapter_image" in parameters:
        if adapter:
            return "ip_adapter_image"
        raise ValueError(f"{kind.__name__} takes a reference through an IP-Adapter only")
    if facts is None and "reference" in parameters:  # the zoo's, and others that call it by its name
        return "reference"
    if "image" in parameters and not parameters & {"prompt", "mask_image"}:
        return "image"
    raise ValueError(f"{kind.__name__} takes no reference image that i2am could trace: {why_not(kind)}")


def call_parameters(kind: type[Any]) -> set[str]:
    """Return the names that a pipeline's call takes."""
    return set(inspect.signature(kind.__call__).parameters) - {"self"}


def why_not(kind: type[Any]) -> str:
    """Return why a pipeline without an adapter has no reference keys, as far as that is known."""
    facts, parameters = facts_of(kind), call_parameters(kind)
    if facts is not None and facts.refused is not None:
        reason = facts.refused
    elif facts is None and calls_own_code(kind):
        reason = (
            f"{UNKNOWN} how {kind.__name__} uses its image, which is {kind.__module__}'s and not diffusers': say which "
            "attention of its model looks at it, with i2am.patch_unet or i2am.patch_modules(model, layers=…, "
            "reference=…)"
        )
    elif not _pictures(parameters):
        reason = "it draws from text alone"
    else:
        reason = f"{UNKNOWN} how {kind.__name__} uses its image: describe the keys with reference= if they are known"
    return with_adapter(kind, reason)


def with_adapter(kind: type[Any], reason: str) -> str:
    """Return a reason, and what may be done about it where a pipeline takes IP-Adapters."""
    if "ip_adapter_image" not in call_parameters(kind):
        return reason
    return f"{reason}, and its attention looks at text; load the IP-Adapter first, or describe the keys with reference="


def _pictures(parameters: set[str]) -> list[str]:
    return [
        p
        for p in parameters
        if any(x in p for x in PICTURES)
        and p not in NUMBERS
        and not p.startswith(("ip_adapter", "num_", "negative_ip", "prev_"))
    ]


def described_tokens(model: nn.Module, request: Request) -> list[Reference] | None:
    """Return what a caller says of the tokens of a model that joins its pictures as tokens; None: nothing.

    Raises:
        ValueError: pictures side by side are described.
    """
    described = request.references
    if isinstance(described, (Concatenated, Banked)):
        raise ValueError(
            f"{type(model).__name__} joins its pictures as tokens, which need no description: got {described!r}"
        )
    return described
