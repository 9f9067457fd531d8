"""An ablation's cells together as one record: every cell's scores, and each variant's paired test.

The paired difference is of a question's score, averaged over the seeds, from the final model's on
the same question; interval and p-value treat an image's questions as one
(harness/scoring/paired.py).  They speak of other questions, not of other seeds: `seeds_alike`
counts the seeds in which the difference has the same sign.  The tables are made by
`harness.reporting.ablation_tables`.
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
from harness.data.questions import NO_IMAGE
from harness.reporting import paper
from harness.runs import schema
from harness.runs.store import EvaluationRun
from harness.scoring.paired import Paired, paired


def record_of(axis: str, cells: Sequence[Cell], budget: Budget, root: Path) -> dict[str, Any]:
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
        for task in paper.in_order(first["tasks"])
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
        "settings": first.get("settings", {}),
        "finished": schema.now(),
    }


def _headlines(run: EvaluationRun) -> dict[str, float]:
    """The primary metric of each task, in the paper's unit."""
    found = {}
    for result in run.results():
        value = result.metrics.get(tasks.load(result.task).primary_metric)
        if value is not None:
            found[result.task] = value if result.unit == "points" else 100 * value
    return found


def _test(
    runs: Mapping[tuple[Variant, int], EvaluationRun],
    variant: Variant,
    reference: Variant,
    task: str,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """The paired difference of one variant on one task; empty where no question has a score."""
    varied = [_question_scores(runs[variant, seed], task) for seed in seeds]
    baseline = [_question_scores(runs[reference, seed], task) for seed in seeds]
    shared = [key for key in varied[0] if all(key in found for found in (*varied, *baseline))]
    if not shared:
        return {}
    images = [f"row {row}" if image in (None, NO_IMAGE) else image for row, image in shared]
    test: Paired = paired(
        [fmean(found[key] for found in varied) for key in shared],
        [fmean(found[key] for found in baseline) for key in shared],
        images,
    )
    differences = [
        fmean(a[key] for key in shared) - fmean(b[key] for key in shared)
        for a, b in zip(varied, baseline, strict=True)
    ]
    alike = sum(math.copysign(1, d) == math.copysign(1, test.difference) for d in differences if d)
    return asdict(test) | {"seed_differences": differences, "seeds_alike": alike}


def _question_scores(run: EvaluationRun, task: str) -> dict[tuple[int, str | None], float]:
    return {
        (s.doc_id, s.image): s.score
        for s in run.primary_metric_samples(task)
        if s.score is not None
    }
