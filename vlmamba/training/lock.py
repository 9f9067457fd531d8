"""One trainer at a time for an output folder: `with folder_lock(OUT): ...`.

The kernel gives the lock back when its process ends, so a killed run leaves none behind.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmamba_core.errors import UserError


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Make `folder` and hold OUT/.lock; UserError where that fails or another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{folder} is in use by {owner}; wait for it, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
        file.truncate(0)
