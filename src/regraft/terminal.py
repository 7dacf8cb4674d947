"""How a command behaves towards the terminal: its errors, its end when it is stopped, its progress, its JSON.

Every failure is one sentence on stderr and an exit code: 1 for what the user can mend, 130 and 143 after Ctrl-C and
SIGTERM. Knows no command; imports nothing heavy, so that `--help` stays quick.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click

from regraft.errors import RegraftError, first_line
from regraft.printable import printable

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came: stop as after Ctrl-C."""


def guarded(after_stop: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command end in one sentence and an exit code, whatever happens; `--debug` lets exceptions through.

    after_stop: what a user who has stopped the command should know.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*args: Any, **options: Any) -> None:
            debug = bool(click.get_current_context().obj)
            _escape_on_stdout()
            stops: list[type[KeyboardInterrupt]] = []
            try:
                with _plain_warnings(), _stoppable(stops):
                    command(*args, **options)
            except (BrokenPipeError, click.ClickException, click.exceptions.Exit):
                raise  # click knows these: a pipe whose reader has left needs no words
            except (KeyboardInterrupt, Exception) as e:
                # A stop that comes while a library is imported may end that in an error of another kind.
                if stops or isinstance(e, KeyboardInterrupt):
                    terminated = Terminated in stops
                    to_stderr(f"{'terminated' if terminated else 'interrupted'}: {after_stop}")
                    raise SystemExit(TERMINATED if terminated else INTERRUPTED) from e
                if debug:
                    raise
                to_stderr(sentence(e))
                raise SystemExit(1) from e

        return run

    return wrap


def sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, RegraftError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f" at {os.fsdecode(error.filename)}" if error.filename else ""
        return f"The system refused an operation{place}: {error.strerror}."
    return f"An unforeseen {type(error).__name__} came up ({first_line(error)}): --debug shows where; please report it."


def to_stderr(text: str) -> None:
    """One line on stderr, whatever the text holds."""
    click.echo(printable(" ".join(text.split())), err=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr when it is a terminal (or REGRAFT_PROGRESS=1): one line that is written over."""
    shown = sys.stderr.isatty() or os.environ.get("REGRAFT_PROGRESS") == "1"
    last = 0.0
    is_open = False

    def say(what: str, done: int, total: int) -> None:
        nonlocal last, is_open
        now = time.monotonic()
        if shown and (done == total or now - last > 0.1):
            last, is_open = now, done != total
            click.echo(f"\r\033[K{what} {done}/{total}", err=True, nl=done == total)

    try:
        yield say
    finally:
        if is_open:
            click.echo("\r\033[K", err=True, nl=False)


def print_json(value: Any) -> None:
    """One JSON document, ASCII, so that any file name survives."""
    click.echo(json.dumps(value, allow_nan=False))


def lines_of_stdin() -> list[str]:
    """The lines of standard input as paths, whatever their bytes; RegraftError where it is closed."""
    if sys.stdin is None:
        raise RegraftError("Standard input must be open to read paths from it (-), and is closed: pipe them in.")
    return [os.fsdecode(line.rstrip(b"\r")) for line in sys.stdin.buffer.read().split(b"\n") if line.strip()]


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: to_stderr(f"warning: {message}")
        yield


@contextlib.contextmanager
def _stoppable(stops: list[type[KeyboardInterrupt]]) -> Iterator[None]:
    """Make SIGTERM stop what is inside as Ctrl-C does, and note which of them came; a shell may have Ctrl-C ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        stops.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise stops[-1]

    listened = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        listened.append(signal.SIGINT)
    before = [signal.signal(number, stop) for number in listened]
    try:
        yield
    finally:
        for number, handler in zip(listened, before, strict=True):
            signal.signal(number, handler)


def _escape_on_stdout() -> None:
    """Escape what the encoding of standard output cannot hold, instead of failing on it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
