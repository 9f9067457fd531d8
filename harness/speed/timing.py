"""Time contenders side by side: in one process, in alternation, after a warm-up.

timings = side_by_side({VL_MAMBA: Contender(f), "baseline": Contender(g)}, QUICK)
comparison = Comparison("prefill", "1024 tokens", "run", timings)
comparison.speedup("baseline")        # above 1: VL-Mamba is faster
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

VL_MAMBA = "VL-Mamba"  # the contender that all others are baselines of
LONG_RUN_S = 2.0  # a first run this long counts: what a warm-up would save is lost in it
SHORT_RUN_S = 0.02  # shorter ones are called several times in a row: waking threads takes as long
# Before each such row come as many calls that are not timed: the first ones pay for what another
# contender left behind, such as freed memory that the allocator gives back only now.


@dataclass(frozen=True)
class Effort:
    """How often a contender runs: `least` times, then until `most` times or `seconds` are over.

    A contender that has run for `patience` seconds runs no more, if only once.
    """

    least: int
    most: int
    seconds: float
    patience: float = float("inf")


QUICK = Effort(least=2, most=25, seconds=1.5, patience=6)
FULL = Effort(least=3, most=25, seconds=12, patience=240)


@dataclass(frozen=True)
class Contender:
    """Something to time. One call of `run` does `units` of work (tokens, questions)."""

    run: Callable[[], object]
    units: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds for one unit, of every run: on the clock, and of the processor (all threads).

    On a busy machine the second is the steadier one.
    """

    wall_s: tuple[float, ...]
    processor_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median on the clock."""
        return statistics.median(self.wall_s)

    @property
    def median_processor_s(self) -> float:
        """Median of the processor's time."""
        return statistics.median(self.processor_s)


@dataclass(frozen=True)
class Comparison:
    """The timings of one workload.

    floor_s: seconds that the machine's limits allow at best (narrow_floor_s: in bfloat16);
    peak_bytes: largest memory of each contender's process, where each had one of its own; stopped:
    contenders that were not waited for, whose seconds and bytes are lower bounds.
    """

    kind: str
    shape: str
    unit: str  # of work: "run", "token", "question"
    timings: Mapping[str, Timing]
    floor_s: float | None = None
    peak_bytes: Mapping[str, int] | None = None
    stopped: frozenset[str] = frozenset()
    narrow_floor_s: float | None = None

    def memory_ratio(self, baseline: str, contender: str = VL_MAMBA) -> float:
        """Peak memory of the baseline over that of the contender."""
        peaks = self.peak_bytes or {}
        return peaks[baseline] / peaks[contender]

    def speedup(self, baseline: str, contender: str = VL_MAMBA) -> float:
        """How many times faster the contender is than the baseline, by medians."""
        return self.timings[baseline].median_s / self.timings[contender].median_s

    def processor_speedup(self, baseline: str, contender: str = VL_MAMBA) -> float:
        """The same of processor time."""
        seconds = self.timings[baseline].median_processor_s
        return seconds / self.timings[contender].median_processor_s


def side_by_side(
    contenders: Mapping[str, Contender], effort: Effort, device: str = "cpu"
) -> dict[str, Timing]:
    """Rounds of one run of each contender, until each has had its share of the effort."""
    runs: dict[str, list[tuple[float, float]]] = {}
    calls: dict[str, int] = {}
    for name, contender in contenders.items():
        _built(contender, effort, device)
        first = _timed(contender, device)
        seconds = first[0] * contender.units
        runs[name] = [first] if seconds > LONG_RUN_S else []
        if seconds < SHORT_RUN_S:  # a first call may take several times as long as the next
            seconds = min(_timed(contender, device)[0] for _ in range(3)) * contender.units
        calls[name] = max(1, math.ceil(SHORT_RUN_S / max(seconds, 1e-6)))
    while waiting := [n for n in runs if _unfinished(runs[n], contenders[n].units, effort)]:
        for name in waiting:
            runs[name].append(_timed(contenders[name], device, calls[name]))
    return {name: Timing(*zip(*times, strict=True)) for name, times in runs.items()}


def _built(contender: Contender, effort: Effort, device: str) -> None:
    """On a GPU two calls that do not count: kernels are compiled, tuned and captured in them.

    On a processor a first call costs a few times more than the next; only a long one counts.
    """
    if not device.startswith("cuda"):
        return
    started = time.perf_counter()
    for _ in range(2):
        contender.run()
        synchronize(device)
        if time.perf_counter() - started > effort.patience:
            return


def _unfinished(times: list[tuple[float, float]], units: int, effort: Effort) -> bool:
    spent = sum(wall for wall, _ in times) * units
    if len(times) < effort.least:
        return not times or spent < effort.patience
    return len(times) < effort.most and spent < effort.seconds


def _timed(contender: Contender, device: str, calls: int = 1) -> tuple[float, float]:
    """Seconds for one unit, over some calls: on the clock, and of the processor."""
    for _ in range(calls if calls > 1 else 0):
        contender.run()
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        contender.run()
    synchronize(device)
    spent = time.perf_counter() - wall, time.process_time() - processor
    units = calls * contender.units
    return spent[0] / units, spent[1] / units


def use_device(device: str) -> None:
    """Make a GPU the one that is waited for and whose memory is counted."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def synchronize(device: str) -> None:
    """Wait for what the GPU in use still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
