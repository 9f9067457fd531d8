"""How sure a measurement is: how far its repeats differ, and what else the machine was doing.

    spread([1.0, 1.1, 1.3])           # 0.27: repeats differ by 27 % of their median
    verdict({"prefill": [...]})       # "too noisy: repeat (prefill's runs differ by 41 %)", or ""
    load = OtherLoad()                # ... measure ...
    load.cores()                      # 0.8: other processes kept 0.8 cores busy meanwhile

No torch here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

NOISY = 0.25  # repeats that differ by more than this share of their median are too noisy
MANY = 8  # of so many repeats or more the middle half counts: single ones are interrupted anyway
BUSY = 0.1  # other processes on more than this share of the cores make a machine busy


def spread(times: Sequence[float]) -> float | None:
    """By which share of their median repeats differ; None of a single one.

    From the fastest to the slowest, of `MANY` or more from the first to the third quartile.
    """
    if len(times) < 2:
        return None
    low, high = ends(times)
    return (high - low) / statistics.median(times)


def ends(times: Sequence[float]) -> tuple[float, float]:
    """Between what repeats lie: the fastest and the slowest, of `MANY` the quartiles."""
    if len(times) < MANY:
        return min(times), max(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def noisy(times: Sequence[float]) -> bool:
    """Whether repeats differ by more than `NOISY`."""
    share = spread(times)
    return share is not None and share > NOISY


def spread_text(times: Sequence[float]) -> str:
    """For a table's cell: "12 %", or "one run"."""
    share = spread(times)
    return "one run" if share is None else f"{share:.0%}".replace("%", " %")


def verdict(named: Mapping[str, Sequence[float]]) -> str:
    """What to do about the repeats that differ too much, by name; empty where none do."""
    found = [f"{name} by {spread_text(times)}" for name, times in named.items() if noisy(times)]
    if not found:
        return ""
    return f"too noisy: repeat (runs differ by more than {NOISY * 100:.0f} %: {', '.join(found)})"


class OtherLoad:
    """Work that other processes do on this machine from the moment this is made."""

    def __init__(self) -> None:
        self._began, self._before, self._own = time.monotonic(), _busy_s(), _own_s()

    def cores(self) -> float:
        """Cores that others kept busy on average since then (containers see the whole machine)."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        others = _busy_s() - self._before - (_own_s() - self._own)
        return round(max(0.0, others / elapsed), 2)


def busy(cores: float) -> bool:
    """Whether others keep more than `BUSY` of the machine's cores from a measurement."""
    return cores > BUSY * (psutil.cpu_count() or 1)


def _busy_s() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user
    return sum(times) - idle - guests


def _own_s() -> float:
    """Of this process and of its children that have ended."""
    return sum(psutil.Process().cpu_times()[:4])


def four_digits(value: Any) -> Any:
    """A measured number as a record keeps it; what is no float stays as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
