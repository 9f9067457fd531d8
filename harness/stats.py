"""95 % intervals for benchmark scores.

Questions about one image are not independent, so the bootstrap draws whole images (clusters) with
replacement and recomputes every metric on each draw; the interval is the 2.5 to 97.5 percentile.
Where all answers score alike the bootstrap has zero width; an accuracy then gets Wilson's interval
with one trial per cluster, and anything else has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.common import Benchmark, Doc, Report

Z95 = 1.959963984540054
MIN_DRAWS, MAX_DRAWS = 200, 1000
SCORED_ROWS = 5_000_000  # draws times rows: keeps the largest benchmarks to minutes


@dataclass(frozen=True)
class Interval:
    """A 95 % interval in the metric's own unit, and how it was made."""

    low: float
    high: float
    method: str


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (n >= 1 trials)."""
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def draws_for(rows: int) -> int:
    """How many bootstrap draws a benchmark of that many rows gets."""
    return max(MIN_DRAWS, min(MAX_DRAWS, SCORED_ROWS // max(rows, 1)))


def cluster_bootstrap(
    metrics_of: Callable[[list[int]], Mapping[str, float]],
    clusters: Sequence[str],
    draws: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every metric of the whole sample.

    `metrics_of(rows)` computes the metrics of a list of row numbers, which may repeat;
    `clusters[row]` names the resampling unit of a row. A draw that loses a metric (all images of
    a category left out) says nothing about totals and is drawn again; where that happens to more
    than half of the draws there are no intervals.
    """
    members: dict[str, list[int]] = {}
    for row, key in enumerate(clusters):
        members.setdefault(key, []).append(row)
    groups = list(members.values())
    names = _finite(metrics_of(list(range(len(clusters))))).keys()
    generator = np.random.default_rng(seed)
    kept: list[dict[str, float]] = []
    for _ in range(2 * draws):
        picked = generator.integers(len(groups), size=len(groups))
        drawn = _finite(metrics_of([row for group in picked for row in groups[group]]))
        if names <= drawn.keys():
            kept.append(drawn)
        if len(kept) == draws:
            break
    else:
        return {}
    return {name: _percentiles([drawn[name] for drawn in kept]) for name in names}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def intervals(
    task: Benchmark, docs: Sequence[Doc], report: Report, protocol: str, *, seed: int = 0
) -> dict[str, Interval]:
    """The 95 % interval of every metric in `report` that has one."""
    rows = [(doc, case) for doc, case in zip(docs, report.cases, strict=True) if case is not None]
    clusters = [task.cluster(doc) for doc, _ in rows]
    n_clusters = len(set(clusters))
    if n_clusters < 2:
        return {}

    def metrics_of(picked: list[int]) -> Mapping[str, float]:
        return task.aggregate([rows[i][0] for i in picked], [rows[i][1] for i in picked], protocol)

    draws = draws_for(len(rows))
    method = f"bootstrap of {n_clusters} clusters, {draws} draws"
    found: dict[str, Interval] = {}
    for name, (low, high) in cluster_bootstrap(metrics_of, clusters, draws, seed).items():
        value = report.metrics[name]
        if low < high:
            found[name] = Interval(low, high, method)
        elif _is_accuracy(name, value, report):
            found[name] = Interval(*wilson(value * n_clusters, n_clusters), "wilson")
    return found


def _is_accuracy(name: str, value: float, report: Report) -> bool:
    """Whether the metric is the share of right answers, and all were right or all wrong."""
    scores = [case.score for case in report.cases if case is not None]
    plain = name.rpartition("/")[2] in ("acc", "accuracy")
    return plain and value in (0.0, 1.0) and all(score == value for score in scores)
