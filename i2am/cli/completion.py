"""``i2am completion``: a script that completes commands, options and their values, made from the parser itself."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from i2am.cli.streams import say

BASH = """\
_i2am() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "$command $before" in
{values}
    esac
    case "$command" in
{cases}
    esac
}}
complete -o default -F _i2am i2am
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
SHELLS = ("bash", "zsh", "fish")
SOME = {"--device": ("cpu", "cuda", "mps"), "--time-groups": ("steps",)}  # values of options that take others, too


class Words(NamedTuple):
    """Words that may follow a command."""

    flags: dict[str, tuple[str, ...] | None]  # option → its values, as far as they are known; None: it takes none
    first: tuple[str, ...]  # values of an argument without a name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = 'Prints a script for the shell: eval "$(i2am completion bash)", or the same in zsh; '
    parser.description += "i2am completion fish | source."
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    from i2am.cli import build_parser

    commands = {name: _words(command) for name, command in _commands(build_parser()).items()}
    say(_fish(commands) if args.shell == "fish" else _bash(commands, args.shell))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(subparsers.choices)


def _words(parser: argparse.ArgumentParser) -> Words:
    flags: dict[str, tuple[str, ...] | None] = {}
    first: tuple[str, ...] = ()
    for action in parser._actions:
        values = tuple(map(str, action.choices or ()))
        names = [name for name in action.option_strings if name.startswith("--")]
        if not action.option_strings:
            first += values
        for name in names:
            flags[name] = None if action.nargs == 0 else values or SOME.get(name, ())
    return Words(flags, first)


def _bash(commands: dict[str, Words], shell: str) -> str:
    cases, values = [], []
    for command, words in commands.items():
        offered = _offer(words.flags)
        cases.append(f'        {command}) [[ "$word" == -* ]] && {offered} ;;')
        if words.first:
            cases[-1] = f'        {command}) if [[ "$word" == -* ]]; then {offered}; else {_offer(words.first)}; fi ;;'
        known = {name: some for name, some in words.flags.items() if some}
        values += [f'        "{command} {name}") {_offer(some)}; return ;;' for name, some in known.items()]
    names = " ".join([*commands, "--help", "--version"])
    script = BASH.format(commands=names, values="\n".join(values), cases="\n".join(cases))
    return (ZSH if shell == "zsh" else "") + script


def _offer(words: dict[str, tuple[str, ...] | None] | tuple[str, ...]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word"))'


def _fish(commands: dict[str, Words]) -> str:
    lines = [f"complete -c i2am -n __fish_use_subcommand -f -a {name}" for name in commands]
    for command, words in commands.items():
        start = f'complete -c i2am -n "__fish_seen_subcommand_from {command}"'
        lines += [f'{start} -f -a "{" ".join(words.first)}"'] if words.first else []
        for name, values in words.flags.items():
            follows = "" if values is None else f' -x -a "{" ".join(values)}"' if values else " -r"
            lines.append(f"{start} -l {name.removeprefix('--')}{follows}")
    return "\n".join(lines)
