"""Scores of several runs, runs across and metrics down, as a table's cells and as a picture.

    found = Scores.of(runs)     # one block of lines a task, its parts apart
    found.picture()             # every task's primary metric with its interval

A bar shows a value and its interval as a share of the metric's largest possible value, so that per
cent and points share one axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import tasks
from harness.reporting import compare, paper, plots, render
from harness.runs.schema import TaskResult
from harness.runs.store import EvaluationRun
from harness.scoring.intervals import Interval
from tasks.common import Unit
from vlmamba_core.errors import UserError

ALL_PAIRS = 6  # runs up to which every two are compared; of more, each with the first
BAND_PX, MARK_PX, TITLE_PX = 10, 13, 18  # below a task's marks, between marks, for its name


@dataclass(frozen=True)
class Bar:
    """A value and its interval as shares of the metric's largest value, for drawing."""

    value: float
    low: float | None
    high: float | None

    def at(self, end: str) -> str:
        """Where an end is drawn: "42.00%"."""
        return f"{100 * min(max(getattr(self, end), 0.0), 1.0):.2f}%"


@dataclass(frozen=True)
class Score:
    """A run's value of a metric as a cell shows it.

    number: in the unit shown (per cent or points), for differences.  paired: place of another run
    -> the paired interval of the difference, where that difference is the one of the metric.
    """

    text: str
    interval: str
    n: int
    number: float
    bar: Bar
    paired: dict[int, str] = field(default_factory=dict)

    def paired_json(self) -> str:
        """`paired` for the page's script."""
        return json.dumps(self.paired)


@dataclass(frozen=True)
class Line:
    """A metric of a task, or of a part of it, with a cell a run (None: that run has none)."""

    part: str
    metric: str
    cells: Sequence[Score | None]


@dataclass(frozen=True)
class TaskScores:
    """A task's lines: the primary metric first, parts apart.

    remarks: per run what was not scored; marks: per run what sets its scores apart in this task
    alone, such as a prompt option.
    """

    task: str
    lines: Sequence[Line]
    parts: Sequence[Line]
    remarks: Sequence[str]
    marks: Sequence[Sequence[str]]

    @property
    def remarkable(self) -> bool:
        """Whether there is anything to say below the lines."""
        return any(self.remarks) or any(self.marks) or not self.lines


@dataclass(frozen=True)
class Mark:
    """A run's value in the picture."""

    run: int
    bar: Bar
    y: int
    title: str


@dataclass(frozen=True)
class Band:
    """A task in the picture: its name above its runs' marks."""

    title: str
    y: int
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Picture:
    """The whole picture; heights in CSS pixels, widths in shares."""

    bands: Sequence[Band]
    height: int


@dataclass(frozen=True)
class Scores:
    """All tasks of some runs."""

    runs: Sequence[EvaluationRun]
    tasks: Sequence[TaskScores]

    @classmethod
    def of(cls, runs: Sequence[EvaluationRun]) -> Scores:
        """The scores of runs; tasks in the order of the paper's columns."""
        results = [{result.task: result for result in run.results()} for run in runs]
        names = paper.in_order(name for found in results for name in found)
        return cls(runs, [_task(name, runs, [r.get(name) for r in results]) for name in names])

    def picture(self) -> Picture:
        """Every task's primary metric: a mark a run, in the order of the table's columns."""
        bands, y = [], 0
        for found in self.tasks:
            line = found.lines[0] if found.lines else None
            if line is None:
                continue
            first = y + TITLE_PX + MARK_PX // 2
            present = [(run, cell) for run, cell in enumerate(line.cells) if cell is not None]
            marks = [
                Mark(run, cell.bar, first + place * MARK_PX, _spoken(self.runs[run], line, cell))
                for place, (run, cell) in enumerate(present)
            ]
            title = f"{found.task}, {line.metric}"
            bands.append(Band(title, y + TITLE_PX - 5, marks))
            y += TITLE_PX + len(marks) * MARK_PX + BAND_PX
        return Picture(bands, y)


def look(run: int) -> tuple[int, int]:
    """(color, marker) of the run in this place: other markers once the colors are used up."""
    colors = len(plots.COLORS)
    return run % colors, (run + run // colors) % len(plots.MARKERS)


def _spoken(run: EvaluationRun, line: Line, cell: Score) -> str:
    return f"{run.marked}: {line.metric} {cell.text} ({cell.interval})"


def _task(
    name: str, runs: Sequence[EvaluationRun], results: Sequence[TaskResult | None]
) -> TaskScores:
    present = [result for result in results if result is not None]
    keys = dict.fromkeys(key for result in present for key in result.metrics)
    overall = dict.fromkeys(m for r in present for m in r.overall_metrics if m in keys)
    lines = [_line(key, results) for key in overall]
    parts = [_line(key, results) for key in keys if "/" in key]
    _add_paired(lines, _paired(name, runs))
    return TaskScores(
        task=name,
        lines=lines,
        parts=parts,
        remarks=["" if result is None else result.counts_note() for result in results],
        marks=[
            [] if result is None else [mark for mark in result.marks if mark not in run.marks]
            for run, result in zip(runs, results, strict=True)
        ],
    )


def _line(key: str, results: Sequence[TaskResult | None]) -> Line:
    part, _, metric = key.rpartition("/")
    cells = [
        None if result is None or key not in result.metrics else _score(key, result)
        for result in results
    ]
    return Line(part, metric, cells)


@dataclass(frozen=True)
class Pair:
    """Mean scores of two runs over the questions of both, in per cent, and the test in words."""

    means: tuple[float, float]
    text: str


def _add_paired(lines: Sequence[Line], paired: Mapping[tuple[int, int], Pair]) -> None:
    """Put each paired interval beside the metric that it is of.

    The test is of the questions' mean scores: POPE's accuracy, not its F1, however near both are.
    """
    for (a, b), pair in paired.items():
        found: list[tuple[float, Score]] = []
        for line in lines:
            one, other = line.cells[a], line.cells[b]
            if one and other:
                shown = one.number, other.number
                away = max(abs(x - y) for x, y in zip(shown, pair.means, strict=True))
                found += [(away, one)] if away < 0.05 else []
        if found:
            min(found, key=lambda entry: entry[0])[1].paired[b] = pair.text


def _score(key: str, result: TaskResult) -> Score:
    metric, part = key.rpartition("/")[2], "/" in key
    unit: Unit = result.unit if not part or metric == "score" else "fraction"  # MME's acc
    value, interval = result.metrics[key], result.intervals.get(key)
    known = result.task in tasks.NAMES
    largest = tasks.load(result.task).maximum(key, result.metrics) if known else 1.0
    ends = (interval.low, interval.high) if isinstance(interval, Interval) else (None, None)
    low, high = (None if end is None else end / largest for end in ends)
    return Score(
        text=render.value_text(value, unit),
        interval="no interval" if interval is None else render.interval_text(interval, unit),
        n=result.metric_n.get(key, result.n),
        number=value * (1 if unit == "points" else 100),
        bar=Bar(value / largest, low, high),
    )


def _paired(name: str, runs: Sequence[EvaluationRun]) -> dict[tuple[int, int], Pair]:
    """(place of A, place of B) -> the mean scores of both and the interval of A - B."""
    places = [place for place, run in enumerate(runs) if name in run.tasks]
    pairs: Any = permutations(places, 2)
    if len(runs) > ALL_PAIRS:
        pairs = [(place, places[0]) for place in places[1:]]
    found: dict[tuple[int, int], Pair] = {}
    for a, b in pairs:
        if (b, a) in found:
            continue
        try:
            compared = compare.compare_task(runs[a], runs[b], name)
        except UserError:  # not the same questions: "Runs compared" says so
            continue
        if compared is not None:
            means = 100 * compared.mean_a, 100 * compared.mean_b
            found[a, b] = Pair(means, _signed(compared.paired, 1))
            found[b, a] = Pair(means[::-1], _signed(compared.paired, -1))
    return found


def _signed(test: compare.Paired, sign: int) -> str:
    if test.low is None or test.high is None:
        return render.paired_interval_text(test)
    low, high = sorted((100 * sign * test.low, 100 * sign * test.high))
    return f"{low:+.1f} to {high:+.1f}, p {render.p_text(test.p_value)}"
