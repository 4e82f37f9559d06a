"""``i2am compare``: two runs, or two checkpoints on one manifest."""

from __future__ import annotations

import argparse
from pathlib import Path

from i2am.cli import evaluate
from i2am.cli.arguments import UserError, add_adapter_options, add_map_options, add_run_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_adapter_options(parser)
    add_run_options(parser)
    add_map_options(parser)


def run(args: argparse.Namespace) -> int:
    from i2am import compare

    folders, code = [Path(args.a), Path(args.b)], 0
    if args.manifest is not None:
        folders = [args.out / name for name in "ab"]
        for pipeline, folder in zip((args.a, args.b), folders, strict=True):
            code = max(code, evaluate.run(_evaluation(args, pipeline, folder)))
            if code > evaluate.FAILED:
                return code
    try:
        comparison = compare.compare(*folders)
        compare.write(comparison, args.out)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--out: cannot write to {args.out}: {error.strerror}") from error
    print(compare.said(comparison))
    print(f"wrote compare.json, compare.csv, compare.png and movers.png to {args.out}")
    return code


def _evaluation(args: argparse.Namespace, pipeline: str, out: Path) -> argparse.Namespace:
    """The arguments of ``i2am evaluate`` for one of the two."""
    own = {name: value for name, value in vars(args).items() if name not in ("a", "b", "run")}
    return argparse.Namespace(**own | {"pipeline": pipeline, "out": out, "save_images": False, "save_maps": False})
