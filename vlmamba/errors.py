"""Errors a user can cause, and how the command lines show them.

A `UserError` carries one line that names what was given, what was expected and what to do.
Command lines wrap their `main` in `cli`, which prints that line and exits with code 2.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake of the caller; its message is one line that says how to put it right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not registered: lists the known ones, nearest first."""
    names = sorted(known)
    nearest = sorted(
        names, key=lambda n: -difflib.SequenceMatcher(None, name.lower(), n.lower()).ratio()
    )
    return UserError(f"unknown {kind} {name!r}; known, nearest first: {', '.join(nearest)}")


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command line's `main`: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped
