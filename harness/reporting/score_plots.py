"""Plots of scores with intervals: runs by benchmark, and an ablation's variants by benchmark.

    files = {**of_runs(runs), **of_ablation(record)}      # "scores.svg" -> content

A run's mark is its primary metric with the 95 % interval of its record, as a share of the metric's
largest value. An ablation's is the mean over seeds, a small dot each seed; its bar is Student's
interval over them where there are enough seeds, else from the lowest to the highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import tasks
from harness.reporting import paper
from harness.reporting.ablation_tables import largest
from harness.reporting.plots import (
    COLORS,
    FORMATS,
    MARKERS,
    add_legend,
    figure_of,
    plain,
    save,
    style,
)
from harness.reporting.scores import Scores, look
from harness.runs.store import EvaluationRun
from harness.scoring.intervals import MIN_SEEDS, Interval, seeds_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3  # panels of an ablation in a row


def of_runs(runs: Sequence[EvaluationRun], name: str = "paper") -> dict[str, bytes]:
    """One picture of all runs' scores; nothing without a score."""
    if not any(task.lines for task in Scores.of(runs).tasks):
        return {}
    return {f"scores.{format_}": _scores(runs, format_, name) for format_ in FORMATS}


def of_ablation(record: Mapping[str, Any], name: str = "paper") -> dict[str, bytes]:
    """One picture of a study's scores by variant; nothing without a score."""
    if not any(cell["metrics"] for cell in record["cells"]):
        return {}
    return {f"scores.{format_}": _ablation(record, format_, name) for format_ in FORMATS}


def _scores(runs: Sequence[EvaluationRun], format_: str, name: str) -> bytes:
    bands = [task for task in Scores.of(runs).tasks if task.lines]
    rows = sum(1 + sum(cell is not None for cell in task.lines[0].cells) for task in bands)
    with figure_of(name, 1, shares=(1.0, 0.25 + rows / 22)) as figure:
        axis = figure.subplots()
        y, places = 0.0, []
        for task in bands:
            places.append(y)
            for run, cell in enumerate(task.lines[0].cells):
                if cell is not None:
                    color, marker = look(run)
                    shown = (cell.bar.value, cell.bar.low, cell.bar.high)
                    label = plain(runs[run].marked)
                    _mark(axis, [100 * v if v is not None else None for v in shown], y, label,
                          color, marker, style(name).line)  # fmt: skip
                    y += 1
            y += 1
        axis.set_yticks(places, [plain(f"{task.task}\n{task.lines[0].metric}") for task in bands])
        axis.set(xlim=(0, 100), xlabel="per cent of the metric's largest value, 95 % interval")
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        labels = dict.fromkeys(str(run.record["label"]) for run in runs if run.record.get("label"))
        axis.set_title(plain("; ".join(labels)), fontsize="small", loc="left")
        add_legend(figure, [axis])
        return save(figure, format_)


def _mark(
    axis: Axes,
    shown: Sequence[float | None],
    y: float,
    label: str,
    color: int,
    marker: int,
    width: float,
) -> None:
    """A value with its interval, where it has one. shown: value, low, high."""
    value, low, high = shown
    assert value is not None
    bars = None if low is None or high is None else [[max(0, value - low)], [max(0, high - value)]]
    axis.errorbar([value], [y], xerr=bars, label=label, color=COLORS[color], linestyle="",
                  marker=MARKERS[marker], markersize=5 * width, elinewidth=1.4 * width,
                  capsize=2 * width)  # fmt: skip


def _ablation(record: Mapping[str, Any], format_: str, name: str) -> bytes:
    by_variant: dict[str, list[Mapping[str, float]]] = {}
    for cell in record["cells"]:
        by_variant.setdefault(cell["variant"], []).append(cell["metrics"])
    present = paper.in_order(task for cell in record["cells"] for task in cell["metrics"])
    down = -(-len(present) // ACROSS)
    shares = (0.6, 0.25 + 0.06 * len(by_variant))
    with figure_of(name, min(ACROSS, len(present)), down, shares) as figure:
        axes = figure.subplots(down, min(ACROSS, len(present)), squeeze=False, sharey=True)
        for axis, task in zip(axes.flat, present, strict=False):
            _panel(axis, by_variant, task, str(record["final"]), style(name).line)
        for axis in axes.flat[len(present) :]:
            axis.set_visible(False)
        axes[0][0].invert_yaxis()  # shared: of all panels
        title = f"Ablation of {record['axis']}" + f": {record['label']}" * bool(record["label"])
        figure.suptitle(plain(title), fontsize="medium")
        add_legend(figure, list(axes.flat))
        return save(figure, format_)


def _panel(
    axis: Axes,
    by_variant: Mapping[str, Sequence[Mapping[str, float]]],
    task: str,
    final: str,
    width: float,
) -> None:
    """One benchmark: a line a variant."""
    most = largest(task) if task in tasks.NAMES else None
    for y, (variant, cells) in enumerate(by_variant.items()):
        values = [cell[task] for cell in cells if task in cell]
        if not values:
            continue
        is_final = variant == final
        low, high, bar = _spread(values, most)
        mean = fmean(values)
        label = f"{'final model' if is_final else 'variant'}: mean over seeds"
        label += f", {bar}" * bool(bar)
        _mark(axis, (mean, low, high), y, label, 1 if is_final else 0, 1 if is_final else 0, width)
        axis.plot(values, [y + 0.22] * len(values), ".", color="#767676", markersize=3.5 * width,
                  label="one seed")  # fmt: skip
    axis.set_yticks(range(len(by_variant)), [plain(variant) for variant in by_variant])
    axis.margins(y=0.15)
    axis.set_title(plain(paper.benchmarks().get(task, task)), fontsize="small")


def _spread(values: Sequence[float], most: float | None) -> tuple[float | None, float | None, str]:
    """(low, high, what they are); nothing for one seed."""
    if len(values) < 2:
        return None, None, ""
    found = seeds_interval(values, most) if most is not None else None
    if isinstance(found, Interval):
        return found.low, found.high, "95 % interval"
    few = f"lowest to highest (an interval takes {MIN_SEEDS} seeds)"
    return min(values), max(values), few
