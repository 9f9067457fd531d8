"""Errors a user can cause, and how the command lines show them.

A `UserError` carries one line that names what was given, what was expected and what to do.
Command lines wrap their `main` in `cli`, which prints that line and exits with code 2.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import select
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PIPE_CLOSED = 128 + 13  # the exit code of a program that SIGPIPE ended


class UserError(Exception):
    """A mistake of the caller; its message is one line that says how to put it right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not registered: lists the known ones, nearest first."""
    names = sorted(known)
    nearest = sorted(
        names, key=lambda n: -difflib.SequenceMatcher(None, name.lower(), n.lower()).ratio()
    )
    return UserError(f"unknown {kind} {name!r}; known, nearest first: {', '.join(nearest)}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, like every other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and leaving."""
        raise UserError(f"{message} (see --help)")


def one_line(text: str) -> str:
    """`text` in one line that a terminal shows as it is: what came from a file cannot steer it."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _end_bars() -> None:
    """Leave the line of a progress bar that an error has stopped."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def reader_left() -> list[int]:
    """Which of stdout and stderr are pipes that nobody reads any more (`... | head`)."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # errors are reported whether asked for or not
    return [number for number, event in poll.poll(0) if event & select.POLLERR]


def _discard(numbers: Iterable[int]) -> None:
    """Send what is still in the buffers of these streams nowhere: nothing is left to complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command line's `main`: a UserError becomes one line on stderr and exit code 2.

    A reader that has seen enough (`... | head`) ends the command without a word, exit code 141.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            try:
                return _run(main, *args, **kwargs)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except BrokenPipeError:
            left = reader_left()
            if not left:  # another pipe of ours
                raise
            _discard(left)
            return PIPE_CLOSED

    return wrapped


def _run(main: Callable[..., int | None], *args, **kwargs) -> int:
    try:
        return main(*args, **kwargs) or 0
    except UserError as error:
        _end_bars()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _end_bars()
        where = f" {error.filename}" if error.filename else ""
        what = f"cannot write{where}: {error.strerror}"
        print(f"error: {what}; make room and run the same command again", file=sys.stderr)
        return 2
