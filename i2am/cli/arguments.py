"""What the commands share: the errors of a user, option types, and the one table of options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from i2am.cli.streams import say

if TYPE_CHECKING:
    import torch

DONE, SOME_FAILED, USAGE, STOPPED, INTERNAL = range(5)  # exit codes
EXIT_CODES = (
    "exit codes: 0 done; 1 some samples failed, or the model made values that are not finite; 2 wrong input; 3 stopped "
    "early (full disk, signal), what is finished is kept; 4 an error of i2am itself (--debug shows where)"
)
DTYPES = ("float32", "float16", "bfloat16")
OFFLOAD = ("model", "sequential")


class UserError(Exception):
    """Something about the input that the user can put right; the message is one sentence."""


class RunFailed(Exception):
    """A run whose input was right and whose model was not: exit code 1, as of samples; the message is one sentence."""


class StoppedEarly(Exception):
    """A run that could not go on, with nothing wrong with its input: exit code 3; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence instead of printing the usage first."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help and version as every other line is; argparse's own drops what cannot be written, in silence."""
        say(message, end="")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def time_groups(text: str) -> int | str:
    """Read a number of time groups, or "steps"."""
    return text if text == "steps" else positive(text)


def seed(text: str) -> int:
    """Read a seed that torch takes."""
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def size(text: str) -> tuple[int, int]:
    """Read "HxW", both multiples of 8."""
    match = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text)
    height, width = (int(n) for n in match.groups()) if match else (0, 0)
    if not all(n > 0 and n % 8 == 0 for n in (height, width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a height x width in multiples of 8, such as 512x384")
    return height, width


def nbytes(text: str) -> str:
    """Check a size such as 2GB; it stays the text that it is."""
    from i2am._files import parse_size

    try:
        parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def part(text: str) -> tuple[str, str]:
    """Read "NAME=REPO_OR_DIR"."""
    name, _, place = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not place:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part and a place, such as controlnet=DIR")
    return name, place


def device(text: str) -> torch.device:
    """Read a device that this machine has."""
    import torch

    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: {reason}") from error


def flag(option: str) -> str:
    """Name an option as it is typed: ``guidance_scale`` → ``--guidance-scale``."""
    return "--" + option.replace("_", "-")


ADAPTER = "IP-Adapter (text-to-image pipelines take their reference through one)"
LOADING = "loading"
RUN = "the run (what is left out is the pipeline's own default)"
MAPS = "the maps"


@dataclass(frozen=True)
class Option:
    """One option of every command that runs a pipeline. A new one is a line of ``OPTIONS``.

    Attributes:
        name: as in the parsed arguments; typed as ``--name`` with hyphens.
        group: title of its group in the help.
        kwargs: for ``add_argument``.
        call: the argument of the pipeline's call that takes the value; None: something else does.
        setting: results depend on it, so that a folder of other values is refused.
    """

    name: str
    group: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    call: str | None = None
    setting: bool = True


def _option(
    name: str,
    group: str,
    metavar: str | None,
    help: str | None = None,
    *,
    type: Callable[[str], Any] | None = None,
    call: str | None = None,
    setting: bool = True,
    **kwargs: Any,
) -> Option:
    given = {"metavar": metavar, "help": help, "type": type, **kwargs}
    return Option(name, group, {k: v for k, v in given.items() if v is not None}, call, setting)


OPTIONS = (
    _option("ip_adapter", ADAPTER, "REPO_OR_DIR", "hub name or folder", setting=False),
    _option("ip_adapter_weight", ADAPTER, "NAME", "weight file; not needed if the folder has one"),
    _option("ip_adapter_subfolder", ADAPTER, "S", "where in it the weight file lies"),
    _option("ip_adapter_scale", ADAPTER, "X", "strength (default: 1)", type=number),
    _option("lora", LOADING, "REPO_OR_FILE", "LoRA weights on top: hub name, folder or file", setting=False),
    _option(
        "part",
        LOADING,
        "NAME=REPO_OR_DIR",
        "a part of the pipeline from elsewhere, such as controlnet=DIR or motion_adapter=DIR: a folder of its own, or "
        "a pipeline's that has such a part; may be repeated",
        type=part,
        action="append",
        setting=False,
    ),
    _option("pipeline_class", LOADING, "CLASS", "load it as this class of diffusers, such as AnimateDiffPipeline"),
    _option("variant", LOADING, "V", "of the weight files, such as fp16"),
    _option("revision", LOADING, "R", "branch, tag or commit of a hub repository"),
    _option(
        "offload",
        LOADING,
        None,
        "keep weights off the GPU: by model, or layer by layer",
        choices=OFFLOAD,
        setting=False,
    ),
    _option("prompt", RUN, "TEXT", "default: empty, where the pipeline takes one", call="prompt"),
    _option("negative_prompt", RUN, "TEXT", call="negative_prompt"),
    _option("steps", RUN, "N", "denoising steps", type=positive, call="num_inference_steps"),
    _option("guidance_scale", RUN, "G", type=number, call="guidance_scale"),
    _option("frames", RUN, "N", "of a video", type=positive, call="num_frames"),
    _option("size", RUN, "HxW", "height x width in pixels, multiples of 8", type=size),
    _option("seed", RUN, "S", "default: 0", type=seed, default=0),
    _option("device", RUN, "D", "default: cuda where there is one, else cpu", type=device, setting=False),
    _option("dtype", RUN, None, "default: float32 on cpu, else float16", choices=DTYPES, setting=False),
    _option("time_groups", MAPS, "T", 'default: 5; "steps": one a step', type=time_groups, default=5),
    _option("word", MAPS, "WORD", "of the prompt, to tell apart from the reference; may be repeated", action="append"),
    _option("layers", MAPS, "GLOB", 'such as "up_blocks.*"; may be repeated', action="append"),
)
CALL_OPTIONS = {option.call: option.name for option in OPTIONS if option.call is not None}


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option] = OPTIONS) -> None:
    """Give a command the options of the table, under the titles of their groups."""
    groups: dict[str, Any] = {}
    for option in options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(flag(option.name), **option.kwargs)
