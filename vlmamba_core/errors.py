"""The error of a caller's mistake: one line that says what was given, expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the caller; its message is one line that says how to put it right."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not registered: lists the known ones, nearest first."""
    names = sorted(known)
    nearest = sorted(
        names, key=lambda n: -difflib.SequenceMatcher(None, name.lower(), n.lower()).ratio()
    )
    return UserError(f"unknown {kind} {name!r}; known, nearest first: {', '.join(nearest)}")


def one_line(text: str) -> str:
    """`text` in one line that a terminal shows as it is: what came from a file cannot steer it."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of what an error says, cut at `length`; its kind where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:length]


def shortened(error: BaseException, length: int = 300) -> str:
    """All that an error says in one line, cut at `length`: its first line often hides the cause."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."
