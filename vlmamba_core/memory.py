"""Memory of this process and of the machine, in bytes.

The peak is Linux's VmHWM: psutil has no peak there, and getrusage's ru_maxrss survives exec, so
that a child would report its parent's.  Elsewhere ru_maxrss is what there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def resident_bytes() -> int:
    """Resident now."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The most that was resident at once since the process began, or since `reset_peak`."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> int:
    """Give freed memory back and begin a new peak; resident bytes now.

    Where the system does not let a process reset its peak, it stays that of its life.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def keep_freed() -> None:
    """Let this process keep memory that it frees for what it allocates next (glibc; else nothing).

    A pass over a model frees some hundred MiB and needs them again in the next.  By default they
    go back to the system each time, and to get them again costs a page fault for every 4 KiB: an
    eighth of a training step of a small model.  Blocks of 32 MiB and more still go back.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_TOP_PAD, 16 * 2**20)


def total_bytes() -> int:
    """Of the machine."""
    return psutil.virtual_memory().total
