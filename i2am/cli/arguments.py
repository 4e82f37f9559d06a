"""What the commands share: the one error of a user, option types and option groups."""

from __future__ import annotations

import argparse
import re

import torch

DTYPES = ("float32", "float16", "bfloat16")


class UserError(Exception):
    """Something about the input that the user can put right; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage first."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def positive(text: str) -> int:
    number = int(text) if re.fullmatch(r"\d+", text) else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    size = tuple(int(n) for n in match.groups()) if match else (0, 0)
    if not all(n > 0 and n % 8 == 0 for n in size):
        raise argparse.ArgumentTypeError(f"{text!r} is not a height x width in multiples of 8, such as 512x384")
    return size


def device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: {reason}") from error


def flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("IP-Adapter (text-to-image pipelines take their reference through one)")
    group.add_argument("--ip-adapter", metavar="REPO_OR_DIR", help="hub name or folder")
    group.add_argument("--ip-adapter-weight", metavar="NAME", help="weight file; not needed if the folder has one")
    group.add_argument("--ip-adapter-subfolder", metavar="S", help="where in it the weight file lies")
    group.add_argument("--ip-adapter-scale", type=float, metavar="X", help="strength (default: 1)")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run (what is left out is the pipeline's own default)")
    group.add_argument("--prompt", metavar="TEXT", help="default: empty, where the pipeline takes one")
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps")
    group.add_argument("--guidance-scale", type=float, metavar="G")
    group.add_argument("--size", type=size, metavar="HxW", help="height x width in pixels, multiples of 8")
    group.add_argument("--seed", type=seed, default=0, metavar="S", help="default: 0")
    group.add_argument("--device", type=device, metavar="D", help="default: cuda where there is one, else cpu")
    group.add_argument("--dtype", choices=DTYPES, help="default: float32 on cpu, else float16")


def add_map_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("the maps")
    group.add_argument("--time-groups", type=positive, default=5, metavar="T", help="default: 5")
    group.add_argument("--layers", action="append", metavar="GLOB", help='such as "up_blocks.*"; may be repeated')
    return group
