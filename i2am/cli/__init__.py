"""The ``i2am`` command: one module a subcommand, each with ``add_arguments(parser)`` and ``run(args)``.

What is wrong with the user's input ends as one sentence on stderr and exit code 2; anything else is a bug and keeps its
traceback. Heavy packages are imported where they are used, so that ``i2am --help`` answers at once.
"""

from __future__ import annotations

import sys

import i2am
from i2am.cli import compare, demo, evaluate, trace
from i2am.cli.arguments import Parser, UserError

COMMANDS = {
    "demo": (demo, "trace a small pipeline on photographs, offline, in under a minute"),
    "trace": (trace, "run a diffusers pipeline and map what it took from a reference"),
    "evaluate": (evaluate, "trace and score a whole dataset, on one device or several"),
    "compare": (compare, "what moved between two runs, or two checkpoints, and where"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after the program's name; None: the process's own.

    Returns:
        exit code: 0; 2 for wrong input (one sentence on stderr); 130 after Ctrl-C; or what a command's help says.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except UserError as error:
        print("i2am: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("i2am: interrupted", file=sys.stderr)
        return 130
    except SystemExit as done:  # --help and --version
        return done.code or 0


def _parser() -> Parser:
    parser = Parser(prog="i2am", description="What did an image-to-image diffusion model take from its reference?")
    parser.add_argument("--version", action="version", version=f"i2am {i2am.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser
