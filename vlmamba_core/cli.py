"""What every command shares: its parser, and how it ends.

    @cli
    def main(argv: Sequence[str] | None = None) -> int | None:
        args = Parser(prog="python -m harness.score", description=__doc__).parse_args(argv)

A mistake of the user's is one line and exit code 2, without a traceback; so is a full disk.
Modules that VLMAMBA_PLUGINS names, with commas between, are imported first: parts that they
register are then known to every command, and to the commands that it starts.
"""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from vlmamba_core import __version__
from vlmamba_core.errors import UserError, one_line

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLUGINS = "VLMAMBA_PLUGINS"
PIPE_CLOSED = 128 + 13  # the exit code of a program that SIGPIPE ended


class _Version(argparse.Action):
    """Print the version of the distribution."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"vlmamba-harness {__version__}")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, and that knows --version."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--version", action=_Version, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage and leaving."""
        raise UserError(f"{message} (see --help)")


def disk_full(error: OSError) -> str:
    """What to tell when no more can be written."""
    where = f" {error.filename}" if error.filename else ""
    return f"cannot write{where}: {error.strerror}; make room and run the same command again"


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
    """Decorate a command's `main`: a user's mistake becomes one line, exit code 2.

    A reader that has seen enough (`... | head`) ends the command without a word, exit code 141 as
    shells give it for any program that such a pipe ends.
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


def _import_plugins() -> None:
    """Import the user's own modules. Raises UserError for one that cannot be."""
    for name in filter(None, map(str.strip, os.environ.get(PLUGINS, "").split(","))):
        try:
            importlib.import_module(name)
        except Exception as error:
            raise UserError(
                f"{PLUGINS} names {name}, which cannot be imported: {type(error).__name__}: {error}"
            ) from error


def _run(main: Callable[..., int | None], *args, **kwargs) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # half a surrogate pair is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _import_plugins()
        return main(*args, **kwargs) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        _end_bars()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _end_bars()
        print(f"error: {disk_full(error)}", file=sys.stderr)
        return 2
