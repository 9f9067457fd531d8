"""Child processes that end with their parent, however it ends.

    run([sys.executable, "-m", "vlmamba.train", ...])      # subprocess.run's arguments

A killed `harness.ablate` or `harness.profile` must leave nothing behind that still writes to its
folder, or that takes processor time from the points measured next.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

PR_SET_PDEATHSIG = 1  # Linux, prctl(2): the signal that a process gets when its parent dies


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run`, with a child that the kernel kills when this process dies."""
    parent, libc = os.getpid(), ctypes.CDLL(None)  # loaded before the fork
    return subprocess.run(command, preexec_fn=lambda: die_with(parent, libc), **options)


def die_with(parent: int, libc: ctypes.CDLL) -> None:
    """Ask the kernel, in a child, to kill this process when its parent dies."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)
