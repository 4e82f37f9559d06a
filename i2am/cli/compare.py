"""``i2am compare``: two runs, or two checkpoints on one manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from i2am.cli import evaluate
from i2am.cli.arguments import SOME_FAILED, StoppedEarly, UserError, add_options
from i2am.cli.streams import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "What moved between two runs of the same samples: scores with confidence intervals, the share of attention\n"
        "that moved by time group, head and layer, and the samples that moved most.\n"
        "A and B are folders of `i2am evaluate` or of `i2am trace`; with --manifest: pipelines, evaluated first."
    )
    parser.add_argument("a", metavar="A", help="the run before; with --manifest a pipeline")
    parser.add_argument("b", metavar="B", help="the run after; with --manifest a pipeline")
    parser.add_argument("--out", type=Path, default=Path("i2am-compare"), metavar="DIR", help="default: ./i2am-compare")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="evaluate both on it, into DIR/a and DIR/b")
    parser.add_argument("--restart", action="store_true", help=evaluate.RESTART)
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    folders, code = [Path(args.a), Path(args.b)], 0
    if args.manifest is not None:
        folders = [args.out / name for name in "ab"]
        for pipeline, folder in zip((args.a, args.b), folders, strict=True):
            code = max(code, evaluate.run(_evaluation(args, pipeline, folder)))
            if code > SOME_FAILED:
                return code
    from i2am import compare

    try:
        comparison = compare.compare(*folders)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        compare.write(comparison, args.out)
    except OSError as error:
        raise StoppedEarly(f"--out: cannot write to {args.out}: {error.strerror or error}") from error
    say(compare.format_table(comparison))
    say(f"wrote compare.json, compare.csv, compare.png and movers.png to {args.out}")
    return code


def _evaluation(args: argparse.Namespace, pipeline: str, out: Path) -> argparse.Namespace:
    """Return the arguments of ``i2am evaluate`` for one of the two."""
    own = {name: value for name, value in vars(args).items() if name not in ("a", "b", "run")}
    of_one = {"pipeline": pipeline, "out": out, "save_images": False, "save_maps": False, "log": []}
    return argparse.Namespace(**own | of_one)
