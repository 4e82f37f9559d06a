"""``i2am demo``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from i2am.cli.arguments import UserError, positive, seed
from i2am.cli.results import prepare_output_dir, quiet_libraries, write_results
from i2am.cli.streams import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = "Traces a small trained try-on model on photographs that it never saw."
    parser.add_argument("--out", type=Path, default=Path("i2am-demo"), metavar="DIR", help="default: ./i2am-demo")
    parser.add_argument("--steps", type=positive, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of the initial noise (default: 0)")


# What to try next: (what it shows, command).
NEXT = (
    ("the same shirt from another noise", "i2am demo --seed 1 --out {out}-1"),
    ("what that changed in the maps", "i2am compare {out} {out}-1"),
    ("a pipeline and pictures of yours", "i2am trace --help"),
)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    start = time.perf_counter()
    prepare_output_dir(args.out)
    say("Loading PyTorch, diffusers and a small trained model …")
    quiet_libraries(warnings_too=True)  # they would be about the demo's own parts
    from i2am import demo

    say(f"{demo.NOTE}\nTracing {args.steps} denoising steps …")
    settings = {"command": "demo", "model": demo.MODEL, "steps": args.steps, "seed": args.seed}
    with demo.one_thread():
        try:
            maps, generated, reference = demo.run(args.steps, args.seed)
        except demo.MissingPhotographs as error:
            raise UserError(str(error)) from error
        say("Drawing …")
        write_results(
            args.out,
            maps,
            generated,
            reference,
            settings,
            footer=demo.NOTE,
            masks=demo.masks(),
            story=lambda: demo.story(maps, generated, reference),
        )
        say("\n".join(demo.findings(maps)))
    say(f"\n{time.perf_counter() - start:.0f} s. Open:")
    say(f"  {args.out / 'demo.png'}: all of it in six panels")
    say(f"  {args.out / 'report.html'}: point at the picture, and see where that patch came from")
    say("Then try:")
    for what, command in NEXT:
        say(f"  {command.format(out=args.out):40} # {what}")
