"""The independent check of a run's scores: lmms-eval's own task, beside this harness's.

    differences, against = check(task, metrics, given, "lmms")

Under `lmms`, the task of that benchmark in the installed lmms-eval (its `process_results` and its
aggregation) gets the rows as they were loaded and the answers as they were given; nothing of
`tasks` is asked. Under `paper` no such code is installed: there lmms-eval's task counts what this
harness read out of each answer ("yes", "B"), which checks subsets, pairs, rotations and totals, but
not the reading. Where neither can be had, nothing is compared, and `against` says so.

Which task that is, and what its metrics are called, each benchmark says (`Benchmark.official`).
lmms-eval takes seconds to load, so a trial run (--limit) under `paper` goes without (`skipped`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tasks.common import Benchmark
from tasks.official import Given, Official

if TYPE_CHECKING:
    from harness.models.lmms_tasks import OwnTask

__all__ = ["NOTHING", "Given", "check", "skipped"]
NOTHING = "nothing"


def skipped(task: Benchmark, protocol: str, limit: int | None) -> str:
    """Why no check is made at all; empty where one is."""
    official = task.official
    if official is None:
        return "lmms-eval's own task needs a judge"
    if protocol == "lmms" or official.same_in_both:
        return ""
    if official.reading is None:
        return "lmms-eval has no rules of this protocol"
    return "a trial run" if limit else ""


def check(
    task: Benchmark, metrics: Mapping[str, float], given: Sequence[Given], protocol: str
) -> tuple[list[str], str]:
    """Differences from lmms-eval's own task, in words, and the name of what was compared with.

    given: every row whose image could be read. A row without truth is not lmms-eval's to score;
    one that was left out for another reason is, unless lmms-eval cannot.
    """
    official = task.official
    if official is None:
        return [], NOTHING
    reads = protocol == "lmms" or official.same_in_both
    known = [one for one in given if one.reference is not None]
    if not known or (not reads and official.reading is None):
        return [], NOTHING
    name = Path(official.file).stem
    what = "process_results and aggregation" if reads else "aggregation, of what was read here"
    scored = [one for one in known if one.excluded is None]
    trouble = ""
    for rows, which in ((known, ""), (scored, " (rows scored here)")):
        try:
            expected = _values(official, rows, protocol, reads)
        # Foreign code, on rows that it may not be made for: whatever it raises is its answer.
        except Exception as error:
            trouble = f"; lmms-eval's own {name} cannot take these rows: {error!r}"[:200]
        else:
            return _differences(
                expected, metrics, name, official.digits
            ), f"lmms-eval's own {name}: {what}{which}"
    return [], NOTHING + trouble


def _values(
    official: Official, given: Sequence[Given], protocol: str, reads: bool
) -> dict[str, float]:
    """The name of each metric here -> lmms-eval's value."""
    rows = [official.prepare(one.row) for one in given]
    with _silence():
        from harness.models.lmms_tasks import OwnTask  # loads lmms-eval, which takes seconds

        task = OwnTask.of_file(official.file, rows)
        results: list[tuple[Given, Mapping[str, Any]]] = []
        for one, row in zip(given, rows, strict=True):
            answer = one.answer if reads or not official.reading else official.reading(one)
            if official.unread and one.parsed is None:
                answer = official.unread(one)
            results.append((one, task.results(row, [answer])))
        values = {}
        for name, metric in official.metrics.items():
            if protocol == "lmms" or not metric.only_lmms:
                pooled = protocol == "lmms" or not metric.mean_of_categories
                parts: dict[str, list[Mapping[str, Any]]] = {}
                for one, result in results:
                    if metric.rows(one):
                        part = "" if pooled else one.row["category"]
                        parts.setdefault(part, []).append(result)
                found = [_value(task, metric.name, part) for part in parts.values()]
                values[name] = fmean(found) / official.scale if found else math.nan
    return values


def _value(task: OwnTask, metric: str, results: Sequence[Mapping[str, Any]]) -> float:
    """The metric of what `results` gave; NaN where no row says anything about it."""
    items = [result[metric] for result in results if metric in result]
    return float(task.value(metric, items)) if items else math.nan


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Neither lmms-eval's prints nor those of the programs that it starts."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _differences(
    expected: Mapping[str, float], found: Mapping[str, float], name: str, digits: int | None
) -> list[str]:
    tolerance = 1e-9 if digits is None else 0.51 * 10**-digits
    return [
        f"{metric}: {found.get(metric, math.nan)} here, {value} by lmms-eval's own {name}"
        for metric, value in expected.items()
        if math.isfinite(value) != (metric in found)
        or (metric in found and not math.isclose(value, found[metric], abs_tol=tolerance))
    ]
