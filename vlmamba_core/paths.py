"""Whether a path that a file names stays in the folder it belongs to."""

from __future__ import annotations

import os
from functools import lru_cache


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a file lies in the folder, links followed. A NUL is in no path."""
    path = os.fspath(path)
    if "\0" in path:
        return False
    place, home = _real(os.path.dirname(path)), _real(os.fspath(folder))
    if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
        place = os.path.realpath(path)
    return place == home or place.startswith(home.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=4096)  # a set has many images and few folders
def _real(folder: str) -> str:
    return os.path.realpath(folder)
