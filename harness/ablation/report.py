"""A study's cells together: scores by variant, and each variant against the final model.

A score is the mean over seeds of a benchmark's headline metric; its interval is Student's t over
the seeds, inside the metric's range.  Fewer than five seeds are too few for one: the lowest and the
highest are shown.  The paired difference is of a question's score, averaged over the
seeds, from the final model's on the same question; interval and p-value treat an image's questions
as one (harness/scoring/paired.py).  They speak of other questions, not of other seeds: the last
column says in how many seeds the difference has the same sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import tasks
from harness.ablation.cells import Budget, Cell
from harness.ablation.variants import FINAL, Variant
from harness.reporting import paper
from harness.reporting.compare import interval_text, p_text
from harness.reporting.render import Table
from harness.runs import schema
from harness.runs.store import NO_IMAGE, EvaluationRun
from harness.scoring.intervals import MIN_SEEDS, Interval, seeds_interval
from harness.scoring.paired import Paired, paired

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


def record(axis: str, cells: Sequence[Cell], budget: Budget, root: Path) -> dict[str, Any]:
    """The study as record.json: every cell's scores, and the tests."""
    runs = {(cell.variant, cell.seed): cell.evaluation(root) for cell in cells}
    chosen = list(dict.fromkeys(cell.variant for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    reference = next(v for v in chosen if v.same_model(FINAL[budget.scale]))
    first = next(iter(runs.values())).record
    scores = [
        {"variant": v.name, "seed": seed, "metrics": _headlines(run)}
        for (v, seed), run in runs.items()
    ]
    tests = [
        {"variant": v.name, "task": task, **_test(runs, v, reference, task, seeds)}
        for v in chosen
        if v is not reference
        for task in _tasks(first)
    ]
    return {
        "schema": schema.SCHEMA,
        "kind": "ablation",
        "label": first.get("label"),
        "axis": axis,
        "arguments": asdict(budget) | {"seeds": seeds},
        "protocol": first["protocol"],
        "final": reference.name,
        "cells": scores,
        "tests": [test for test in tests if "difference" in test],
        "terms": first.get("terms", {}),
        "finished": schema.now(),
    }


def tables_of(found: Mapping[str, Any]) -> list[Table]:
    """A record's tables: the scores, and each variant against the final model."""
    return [_score_table(found), _paired_table(found)]


def _tasks(evaluation: Mapping[str, Any]) -> list[str]:
    """The paper's order first, then the others."""
    present = list(evaluation["tasks"])
    return [t for t in paper.BENCHMARKS if t in present] + [
        t for t in present if t not in paper.BENCHMARKS
    ]


def _headlines(run: EvaluationRun) -> dict[str, float]:
    """The headline metric of each task, in the paper's unit."""
    found = {}
    for result in run.results():
        value = result.metrics.get(tasks.load(result.task).headline)
        if value is not None:
            found[result.task] = value if result.points else 100 * value
    return found


def _test(
    runs: Mapping[tuple[Variant, int], EvaluationRun],
    variant: Variant,
    reference: Variant,
    task: str,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The paired difference of one variant on one task; empty where no question has a score."""
    ours = [_question_scores(runs[variant, seed], task) for seed in seeds]
    theirs = [_question_scores(runs[reference, seed], task) for seed in seeds]
    shared = [key for key in ours[0] if all(key in found for found in (*ours, *theirs))]
    if not shared:
        return {}
    images = [f"row {row}" if image in (None, NO_IMAGE) else image for row, image in shared]
    test: Paired = paired(
        [fmean(found[key] for found in ours) for key in shared],
        [fmean(found[key] for found in theirs) for key in shared],
        images,
    )
    differences = [
        fmean(a[key] for key in shared) - fmean(b[key] for key in shared)
        for a, b in zip(ours, theirs, strict=True)
    ]
    alike = sum(math.copysign(1, d) == math.copysign(1, test.difference) for d in differences if d)
    return asdict(test) | {"seed_differences": differences, "seeds_alike": alike}


def _question_scores(run: EvaluationRun, task: str) -> dict[tuple[int, str | None], float]:
    return {(s.doc_id, s.image): s.score for s in run.samples(task) if s.score is not None}


def _score_table(found: Mapping[str, Any]) -> Table:
    """The paper's layout: a row a variant, a column a benchmark."""
    by_variant: dict[str, list[dict[str, float]]] = {}
    for cell in found["cells"]:
        by_variant.setdefault(cell["variant"], []).append(cell["metrics"])
    present = _tasks({"tasks": {t: 0 for cells in by_variant.values() for c in cells for t in c}})
    rows = [
        [name + (" *" if name == found["final"] else ""), *(_mean_text(cells, t) for t in present)]
        for name, cells in by_variant.items()
    ]
    seeds = len(found["arguments"]["seeds"])
    title = f"Ablation of {found['axis']}, {seeds} seed{'s' * (seeds > 1)}"
    headers = [found["axis"], *(paper.BENCHMARKS.get(task, task) for task in present)]
    few = TOO_FEW.format(seeds=f"{seeds} seed{'s' * (seeds > 1)}")
    note = SCORE_NOTE.format(spread=INTERVAL if seeds >= MIN_SEEDS else few)
    return Table(title, headers, rows, _labelled(found, note))


def _mean_text(cells: Sequence[Mapping[str, float]], task: str) -> str:
    """The mean over seeds with its interval [], or with the lowest and highest ()."""
    values = [cell[task] for cell in cells if task in cell]
    if not values:
        return "no score"
    mean = f"{fmean(values):.1f}"
    if len(values) < 2:
        return mean
    interval = seeds_interval(values, _maximum(task)) if task in tasks.NAMES else None
    if not isinstance(interval, Interval):
        return f"{mean} ({min(values):.1f} to {max(values):.1f})"
    return f"{mean} [{interval.low:.1f} to {interval.high:.1f}]"


def _maximum(task: str) -> float:
    """Of the headline metric, in the paper's unit."""
    benchmark = tasks.load(task)
    return benchmark.maximum(benchmark.headline, ()) * (1 if benchmark.points else 100)


def _paired_table(found: Mapping[str, Any]) -> Table:
    rows = []
    for test in found["tests"]:
        fields = {name: test[name] for name in Paired.__dataclass_fields__}
        statistics = Paired(**fields)
        rows.append(
            [
                test["variant"],
                paper.BENCHMARKS.get(test["task"], test["task"]),
                f"{100 * statistics.difference:+.1f}",
                interval_text(statistics),
                p_text(statistics.p_value),
                str(statistics.n),
                str(statistics.clusters),
                f"{test['seeds_alike']}/{len(test['seed_differences'])}",
            ]
        )
    title = f"Ablation of {found['axis']}: against the final model ({found['final']})"
    return Table(title, PAIRED_HEADERS, rows, _labelled(found, PAIRED_NOTE))


def _labelled(found: Mapping[str, Any], note: str) -> str:
    return f"{found['label']}. {note}" if found["label"] else note
