"""``i2am completion``: a script that completes commands and options, made from the parser itself."""

from __future__ import annotations

import argparse

from i2am.cli.streams import say

BASH = """\
_i2am() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "$command" in
{cases}
    esac
}}
complete -o default -F _i2am i2am
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = 'Prints a script for the shell: eval "$(i2am completion bash)", or the same in zsh; '
    parser.description += "i2am completion fish | source."
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    from i2am.cli import build_parser

    commands = {name: _flags(command) for name, command in _commands(build_parser()).items()}
    say((_fish if args.shell == "fish" else _bash)(commands, args.shell))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _bash(commands: dict[str, list[str]], shell: str) -> str:
    cases = "\n".join(
        f'        {name}) [[ "$word" == -* ]] && COMPREPLY=($(compgen -W "{" ".join(flags)}" -- "$word")) ;;'
        for name, flags in commands.items()
    )
    script = BASH.format(commands=" ".join([*commands, "--help", "--version"]), cases=cases)
    return (ZSH if shell == "zsh" else "") + script


def _fish(commands: dict[str, list[str]], shell: str) -> str:
    lines = [f"complete -c i2am -n __fish_use_subcommand -f -a {name}" for name in commands]
    lines += [
        f'complete -c i2am -n "__fish_seen_subcommand_from {name}" -l {flag.removeprefix("--")}'
        for name, flags in commands.items()
        for flag in flags
    ]
    return "\n".join(lines)
