"""The ``i2am`` command: one module a subcommand, each with ``add_arguments(parser)`` and ``run(args)``.

What goes wrong ends as one sentence on stderr and an exit code (``arguments.EXIT_CODES``); ``--debug`` adds the
traceback. Heavy packages are imported where they are used, so that ``i2am --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback

import i2am
from i2am.cli import app, compare, completion, demo, evaluate, trace
from i2am.cli.arguments import (
    DONE,
    EXIT_CODES,
    INTERNAL,
    SOME_FAILED,
    STOPPED,
    USAGE,
    Parser,
    RunFailed,
    StoppedEarly,
    UserError,
)
from i2am.cli.streams import complain, flush_output, show_any_text, stopping_signals

COMMANDS = {
    "demo": (demo, "trace a small pipeline on photographs, offline, in under a minute"),
    "trace": (trace, "run a diffusers pipeline and map what it took from a reference"),
    "evaluate": (evaluate, "trace and score a whole dataset, in one process or several"),
    "compare": (compare, "what moved between two runs, or two checkpoints, and where"),
    "app": (app, "serve a page: load a pipeline, give a reference, run, click patches"),
    "completion": (completion, "print a script that completes this command in a shell"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None: the process's own.

    Returns:
        The exit code, as ``arguments.EXIT_CODES`` says.
    """
    words = sys.argv[1:] if argv is None else argv
    show_any_text()
    with stopping_signals():
        code = _guarded(words, debug="--debug" in words)
    problem = flush_output()
    if problem is None:
        return code
    complain(f"i2am: error: cannot write to standard output: {problem}")
    return code or STOPPED


def _guarded(words: list[str], debug: bool) -> int:
    """Run, with every way to end as an exit code."""
    try:
        parser = build_parser()
        if not words:
            parser.print_help()
            return DONE
        args = parser.parse_args(words)
        return args.run(args) or 0
    except UserError as error:
        return _ended(USAGE, str(error), debug)
    except RunFailed as error:
        return _ended(SOME_FAILED, str(error), debug)
    except StoppedEarly as error:
        return _ended(STOPPED, str(error), debug)
    except KeyboardInterrupt as error:
        complain(f"i2am: interrupted{f' by {error}' if str(error) else ''}; what is finished is kept")
        return STOPPED
    except BrokenPipeError:  # the reader of our output has gone, in the middle of a line
        return STOPPED
    except SystemExit as done:  # --help and --version
        return done.code if isinstance(done.code, int) else 0
    except Exception as error:
        text = f"internal error: {type(error).__name__}: {_text(error)} (--debug shows where)"
        return _ended(INTERNAL, text, debug)


def _ended(code: int, text: str, debug: bool) -> int:
    if debug:
        complain(traceback.format_exc())
    complain(f"i2am: error: {' '.join(text.split())}")
    return code


def _text(error: Exception) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return "(its message cannot be shown)"


def build_parser() -> Parser:
    """Make the parser of all commands."""
    parser = Parser(
        prog="i2am",
        description="What did an image-to-image diffusion model take from its reference?",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"i2am {i2am.__version__}")
    _add_debug(parser, default=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        _add_debug(command, default=argparse.SUPPRESS)
    return parser


def _add_debug(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
