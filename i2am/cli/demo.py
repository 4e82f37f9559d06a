"""``i2am demo``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from i2am.cli.arguments import UserError, positive, seed
from i2am.cli.results import claim, hush, write_results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Traces a small trained try-on model on photographs that it never saw."
    parser.add_argument("--out", type=Path, default=Path("i2am-demo"), metavar="DIR", help="default: ./i2am-demo")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of the initial noise (default: 0)")


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    claim(args.out)
    hush(warnings_too=True)  # they would be about the demo's own parts
    from i2am import demo

    print(demo.NOTE)
    settings = {"command": "demo", "model": demo.MODEL, "steps": args.steps, "seed": args.seed}
    with demo.one_thread():
        try:
            maps, generated, reference = demo.run(args.steps, args.seed)
        except demo.MissingPhotographs as error:
            raise UserError(str(error)) from error
        write_results(args.out, maps, generated, reference, settings, footer=demo.NOTE)
    print(f"{time.perf_counter() - start:.0f} s")
