"""An ablation's record as tables: scores by variant, and each variant against the final model.

A score is the mean over seeds of a benchmark's primary metric; its interval is Student's t over
the seeds, inside the metric's range.  Fewer than five seeds are too few for one: the lowest and the
highest are shown.  The last column of the second table says in how many seeds the difference has
the same sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import tasks
from harness.reporting import paper
from harness.reporting.render import Table, p_text, paired_interval_text
from harness.scoring.intervals import MIN_SEEDS, Interval, seeds_interval
from harness.scoring.paired import Paired

SCORE_NOTE = "Mean over seeds; {spread}. In per cent, MME in points. The final model is marked *."
INTERVAL = "in brackets the 95 % interval over seeds (Student's t)"
TOO_FEW = "the lowest and highest seed in parentheses: {seeds} are too few for an interval"
PAIRED_NOTE = (
    "Mean score of a question, in per cent, minus the final model's; interval and p of the paired "
    "test over images, for these seeds; then the seeds in which the difference has this sign."
)
PAIRED_HEADERS = (
    *("variant", "task", "difference", "95 % interval", "p", "questions", "images", "seeds alike"),
)


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    """A record's tables: the scores, and each variant against the final model."""
    return [_score_table(found), _paired_table(found)]


def _score_table(found: Mapping[str, Any]) -> Table:
    """The paper's layout: a row a variant, a column a benchmark."""
    by_variant: dict[str, list[dict[str, float]]] = {}
    for cell in found["cells"]:
        by_variant.setdefault(cell["variant"], []).append(cell["metrics"])
    present = paper.in_order(t for cells in by_variant.values() for c in cells for t in c)
    rows = [
        [name + (" *" if name == found["final"] else ""), *(_mean_text(cells, t) for t in present)]
        for name, cells in by_variant.items()
    ]
    seeds = len(found["arguments"]["seeds"])
    title = f"Ablation of {found['axis']}, {seeds} seed{'s' * (seeds > 1)}"
    headers = [found["axis"], *(paper.benchmarks().get(task, task) for task in present)]
    few = TOO_FEW.format(seeds=f"{seeds} seed{'s' * (seeds > 1)}")
    note = SCORE_NOTE.format(spread=INTERVAL if seeds >= MIN_SEEDS else few)
    return Table(title, headers, rows, _labeled(found, note))


def _mean_text(cells: Sequence[Mapping[str, float]], task: str) -> str:
    """The mean over seeds with its interval [], or with the lowest and highest ()."""
    values = [cell[task] for cell in cells if task in cell]
    if not values:
        return "no score"
    mean = f"{fmean(values):.1f}"
    if len(values) < 2:
        return mean
    interval = seeds_interval(values, largest(task)) if task in tasks.NAMES else None
    if not isinstance(interval, Interval):
        return f"{mean} ({min(values):.1f} to {max(values):.1f})"
    return f"{mean} [{interval.low:.1f} to {interval.high:.1f}]"


def largest(task: str) -> float:
    """Of the primary metric, in the paper's unit."""
    benchmark = tasks.load(task)
    return benchmark.maximum(benchmark.primary_metric, ()) * (
        1 if benchmark.unit == "points" else 100
    )


def _paired_table(found: Mapping[str, Any]) -> Table:
    rows = []
    for test in found["tests"]:
        fields = {name: test[name] for name in Paired.__dataclass_fields__}
        statistics = Paired(**fields)
        rows.append(
            [
                test["variant"],
                paper.benchmarks().get(test["task"], test["task"]),
                f"{100 * statistics.difference:+.1f}",
                paired_interval_text(statistics),
                p_text(statistics.p_value),
                str(statistics.n),
                str(statistics.clusters),
                f"{test['seeds_alike']}/{len(test['seed_differences'])}",
            ]
        )
    title = f"Ablation of {found['axis']}: against the final model ({found['final']})"
    return Table(title, PAIRED_HEADERS, rows, _labeled(found, PAIRED_NOTE))


def _labeled(found: Mapping[str, Any], note: str) -> str:
    return f"{found['label']}. {note}" if found["label"] else note
