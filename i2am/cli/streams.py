"""Standard output and signals of a command: a closed pipe, a full device and SIGTERM end in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, taken as Ctrl-C is: whatever undoes itself after Ctrl-C does so here."""


@contextlib.contextmanager
def stopping_signals() -> Iterator[None]:
    """Raise Terminated where SIGTERM or SIGHUP arrives; one that is ignored (nohup) stays ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    taken = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


@contextlib.contextmanager
def no_interrupt() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP for a moment that must not be cut in two; they arrive at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOPPING)}
    held = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    try:  # a mask would hold them back in this thread alone, and another of torch's may take them
        for number in held:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number in held:
            signal.signal(number, before[number])
        if came:
            signal.raise_signal(came[0])


def show_any_text() -> None:
    """Let standard output and error write names that they cannot encode, with the odd characters escaped.

    A stream that was closed before the start (``>&-``, a daemon's) leads nowhere from now on. Else its number would be
    that of the next file opened, and what a library prints would go into that.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


_problems: list[str] = []  # what standard output could not take, and why


def say(text: str, end: str = "\n") -> None:
    """Print a line. Where it cannot be written the run goes on: results on disk matter more. The end tells of it."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _note(error)


def _note(error: OSError) -> None:
    """Keep why output failed; a reader that has gone is no error."""
    if not isinstance(error, BrokenPipeError):
        _problems.append(error.strerror or str(error))
    _drop(sys.stdout)


def complain(text: str) -> None:
    """Print a line on standard error, if it still takes any."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def flush_output() -> str | None:
    """Write what standard output still holds; return what went wrong since the last time, or None."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _note(error)
    found = _problems[0] if _problems else None
    _problems.clear()
    return found


def _drop(stream: TextIO) -> None:
    """Send a stream that cannot be written to nowhere, so that the interpreter's end does not try again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
