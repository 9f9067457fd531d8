"""Where files are: whether one stays in its folder, where the cache is; and a file's digest."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from vlmamba_core.errors import UserError


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a file lies in the folder, links followed. A NUL is in no path."""
    path = os.fspath(path)
    if "\0" in path:
        return False
    place, home = _real(os.path.dirname(path)), _real(os.fspath(folder))
    if os.path.islink(path) or os.path.basename(path) in ("", ".", ".."):
        place = os.path.realpath(path)
    return place == home or place.startswith(home.rstrip(os.sep) + os.sep)


def cache_dir() -> Path:
    """$VLMAMBA_CACHE, or ~/.cache/vlmamba."""
    return Path(os.environ.get("VLMAMBA_CACHE") or Path.home() / ".cache" / "vlmamba")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@lru_cache(maxsize=4096)  # a set has many images and few folders
def _real(folder: str) -> str:
    return os.path.realpath(folder)
