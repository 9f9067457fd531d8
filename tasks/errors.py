"""The error of a scoring user's mistake. `vlmamba.errors` is not used here: it comes with torch."""

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
