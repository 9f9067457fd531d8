"""95 % intervals for benchmark scores: inside the possible range, at 0 % and 100 % too.

    found = intervals(task, docs, report, "paper")   # metric -> Interval, or NoInterval with why

Every metric has a smallest value of 0 and a largest one (`Benchmark.maximum`), so it is a share of
the largest.  Its interval is Wilson's, with as many trials as the answers are worth (effective n):
a coin of that share would have the variance that the metric has.

The variance is a jackknife's: leave out one image (cluster) after the other, since questions about
one image are not independent.  From few images it is a poor estimate, so the correlation behind it
is drawn towards 0.2 with the weight of ten images: design effect 1 + (m - 1) rho, where m is the
questions of an image and the variance without any correlation comes from leaving out single rows.
Where a cluster makes one score (MME's pairs, MMBench's rotations) or all answers are right, there
is no correlation to estimate.  Fewer than ten clusters are too few for any of this.

`tools/coverage.py` simulates how often such an interval holds the true value (docs/INTERVALS.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.common import Benchmark, Case, Doc, Report

Z95 = 1.959963984540054
MIN_CLUSTERS = 10
MIN_SEEDS = 5
PRIOR_CORRELATION, PRIOR_CLUSTERS = 0.2, 10  # of answers about one image, and its weight
MIN_GROUPS, MAX_GROUPS = 200, 1000
SCORED_ROWS = 5_000_000  # groups times rows: keeps the largest benchmarks to minutes
TINY = 1e-15  # a variance below it is rounding

Floats = NDArray[np.float64]
Metrics = Callable[[list[int]], Mapping[str, float]]
OfCounts = Callable[[Mapping[Any, int]], Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval in the metric's own unit, and how it was made."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class NoInterval:
    """Why a value has none, in words that fit a table's cell."""

    reason: str


@dataclass(frozen=True)
class Sampled:
    """What a metric was measured on: clusters, rows, and the rows of a row's cluster (mean)."""

    clusters: int
    rows: int
    size: float = 1.0


def wilson(share: ArrayLike, trials: ArrayLike, z: ArrayLike = Z95) -> tuple[Floats, Floats]:
    """Wilson's score interval of a share from that many (perhaps fractional) trials, elementwise.

    Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.  scipy's `binomtest(k, n).proportion_ci` gives
    the same, but only of whole numbers, one pair at a time, and with no other z than the normal's.
    """
    p, n, z2 = np.asarray(share, float), np.asarray(trials, float), np.square(z)
    half = np.sqrt(z2 * p * (1 - p) / n + np.square(z2 / n) / 4)
    center, scale = p + z2 / (2 * n), 1 + z2 / n
    return np.maximum(0.0, (center - half) / scale), np.minimum(1.0, (center + half) / scale)


def share_interval(
    share: ArrayLike, between: ArrayLike, within: ArrayLike | None, sampled: Sampled
) -> tuple[Floats, Floats, Floats]:
    """(low, high, effective n) of shares of the largest value, elementwise.

    between: variance of the share from leaving out clusters; within: from leaving out rows, None
    where a cluster makes one score or is too many to leave each out.
    """
    from scipy import stats

    p = np.asarray(share, float)
    trials = _effective_n(p, np.asarray(between, float), within, sampled)
    # Scores that vary less than a coin: nothing but the sample tells how much, as with a t test.
    student = float(stats.t.ppf(0.975, sampled.clusters - 1))
    units = sampled.clusters if within is None else sampled.rows
    low, high = wilson(p, trials, np.where(trials > units, student, Z95))
    return low, high, trials


def _effective_n(
    share: Floats, between: Floats, within: ArrayLike | None, sampled: Sampled
) -> Floats:
    coin = share * (1 - share)
    inside = np.asarray(between if within is None else within, float)
    told = (inside > TINY) & (coin > TINY)
    variance = np.where(told, inside, 1.0)
    if within is None or sampled.size <= 1:
        alike = 1 + (sampled.size - 1) * PRIOR_CORRELATION
        return np.where(told, coin / variance, sampled.rows / alike)
    effect = np.where(told, between / variance, 1.0)
    estimate = np.where(told, (effect - 1) / (sampled.size - 1), PRIOR_CORRELATION)
    weight = sampled.clusters / (sampled.clusters + PRIOR_CLUSTERS)
    correlation = weight * estimate + (1 - weight) * PRIOR_CORRELATION
    return np.where(told, coin / variance, sampled.rows) / (1 + (sampled.size - 1) * correlation)


def intervals(
    task: Benchmark, docs: Sequence[Doc], report: Report, protocol: str, *, seed: int = 0
) -> dict[str, Interval | NoInterval]:
    """For every metric in `report` its 95 % interval, or why there is none."""
    rows = [(doc, case) for doc, case in zip(docs, report.cases, strict=True) if case is not None]
    found: dict[str, Interval | NoInterval] = {
        name: NoInterval(why) for name, why in report.no_interval.items()
    }
    values = {n: value for n, value in _finite(report.metrics).items() if n not in found}
    if not rows or not values:
        return found

    parts = Parts.of(task, rows, protocol)
    clusters = [task.cluster(doc) for doc, _ in rows]
    sampled = _sampled(parts.metrics, clusters, values, task.scored_alone)
    enough = {name: s for name, s in sampled.items() if s.clusters >= MIN_CLUSTERS}
    if enough:
        between, within = _variances(parts, clusters, values, task.scored_alone, seed)
    for name, value in values.items():
        if name not in enough:
            found[name] = too_few(sampled[name].clusters)
            continue
        if name in report.unbounded:
            found[name] = unbounded_interval(value, between[name], enough[name].clusters)
            continue
        top = task.maximum(name, values)
        inside = None if within is None else within[name] / top**2
        share = min(max(value / top, 0.0), 1.0)
        low, high, trials = share_interval(share, between[name] / top**2, inside, enough[name])
        method = f"Wilson, effective n {float(trials):.0f}, {enough[name].clusters} clusters"
        found[name] = Interval(float(low) * top, float(high) * top, method)
    return found


@dataclass
class Parts:
    """The metrics of some rows out of `count`, and of all rows but some."""

    count: int
    metrics: Metrics

    @classmethod
    def of(cls, task: Benchmark, rows: Sequence[tuple[Doc, Case]], protocol: str) -> Parts:
        """By counts of kinds where the benchmark's metrics follow from these, else row by row."""
        kinds = [task.kind(doc, case) for doc, case in rows]
        if not task.scored_alone or None in kinds:
            docs, cases = [doc for doc, _ in rows], [case for _, case in rows]
            return cls(
                len(rows),
                lambda picked: task.aggregate(
                    [docs[i] for i in picked], [cases[i] for i in picked], protocol
                ),
            )
        return Counted(kinds, lambda counts: task.aggregate_kinds(counts, protocol))

    def without(self, groups: Sequence[Sequence[int]]) -> Iterator[Mapping[str, float]]:
        """The metrics without each group in turn; the groups hold every row once."""
        member = np.concatenate([np.full(len(group), g) for g, group in enumerate(groups)])
        order = np.concatenate([np.asarray(group) for group in groups])
        for left_out in range(len(groups)):
            rest = order[member != left_out]
            yield self.metrics(rest.tolist()) if len(rest) else {}


class Counted(Parts):
    """`Parts` of rows of few kinds: leaving a group out takes its counts from those of all.

    A picture costs its own rows and not all others': 9,000 questions of 500 pictures cost a
    hundredth of going through the rows of every rest.
    """

    def __init__(self, kinds: Sequence[Hashable], of_counts: OfCounts) -> None:
        self._kinds, self._total = kinds, Counter(kinds)
        self._of = of_counts
        self._alone: dict[Hashable, Mapping[str, float]] = {}  # what one row of a kind gives
        super().__init__(len(kinds), self._of_rows)

    def _of_rows(self, picked: list[int]) -> Mapping[str, float]:
        if len(picked) > 1:
            return self._of(Counter(self._kinds[i] for i in picked))
        kind = self._kinds[picked[0]]
        if kind not in self._alone:
            self._alone[kind] = self._of({kind: 1})
        return self._alone[kind]

    def without(self, groups: Sequence[Sequence[int]]) -> Iterator[Mapping[str, float]]:
        """See `Parts`; groups of equal counts are asked about once."""
        known: dict[frozenset, Mapping[str, float]] = {}
        for group in groups:
            counts = Counter(self._kinds[i] for i in group)
            key = frozenset(counts.items())
            if key not in known:
                rest = self._total - counts
                known[key] = self._of(rest) if rest else {}
            yield known[key]


def unbounded_interval(value: float, variance: float, clusters: int) -> Interval | NoInterval:
    """The 95 % interval of a metric that has no largest value: Student's t on its jackknife."""
    from scipy import stats

    if variance <= TINY:
        return NoInterval("the same without any image")
    half = float(stats.t.ppf(0.975, clusters - 1)) * math.sqrt(variance)
    method = f"jackknife, Student's t, {clusters} clusters"
    return Interval(value - half, value + half, method)


def too_few(clusters: int) -> NoInterval:
    """The reason of a score from fewer than `MIN_CLUSTERS` clusters."""
    return NoInterval(f"too few: {clusters} cluster{'s' * (clusters != 1)}")


def _sampled(
    metrics_of: Metrics, clusters: Sequence[str], names: Mapping[str, float], alone: bool
) -> dict[str, Sampled]:
    """For each metric, the clusters and rows that it speaks of: alone they give it a value, too."""
    units = [[row] for row in range(len(clusters))] if alone else _members(clusters)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for unit in units:
        for name in _finite(metrics_of(unit)):
            if name in counts:
                counts[name][clusters[unit[0]]] += 1
    return {
        name: Sampled(
            len(count), count.total(), sum(n * n for n in count.values()) / max(count.total(), 1)
        )
        for name, count in counts.items()
    }


def _variances(
    parts: Parts,
    clusters: Sequence[str],
    values: Mapping[str, float],
    alone: bool,
    seed: int,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Each metric's variance from leaving out clusters, and from leaving out rows.

    No second one where clusters are rows or make one score each, nor where they are too many to
    leave out one by one: from hundreds of clusters the prior has next to no weight.
    """
    generator = np.random.default_rng(seed)
    limit = groups_for(len(clusters))
    by_cluster = _members(clusters)
    between = jackknife(parts, _merged(by_cluster, limit, generator), values)
    if not alone or not limit >= len(by_cluster) < len(clusters):
        return between, None
    by_row = _merged([[row] for row in range(len(clusters))], limit, generator)
    return between, jackknife(parts, by_row, values)


def jackknife(
    parts: Parts, groups: Sequence[Sequence[int]], values: Mapping[str, float]
) -> dict[str, float]:
    """The variance of each metric in `values` by leaving out each group of rows once.

    A metric that is gone without a group (a category in one image) says nothing of its variance.
    """
    sums = dict.fromkeys(values, 0.0)
    for rest in parts.without(groups):
        without = _finite(rest)
        for name in sums.keys() & without.keys():
            sums[name] += (without[name] - values[name]) ** 2
    return {name: total * (len(groups) - 1) / len(groups) for name, total in sums.items()}


def groups_for(rows: int) -> int:
    """How many groups a benchmark of that many rows is left out by, at most."""
    return max(MIN_GROUPS, min(MAX_GROUPS, SCORED_ROWS // max(rows, 1)))


def _members(keys: Sequence[Hashable]) -> list[list[int]]:
    """The rows of each key, in order of first appearance."""
    members: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault(key, []).append(row)
    return list(members.values())


def _merged(groups: list[list[int]], limit: int, generator: np.random.Generator) -> list[list[int]]:
    """At most `limit` groups, of the given ones put together at random."""
    if len(groups) <= limit:
        return groups
    merged: list[list[int]] = [[] for _ in range(limit)]
    for place, group in enumerate(generator.permutation(len(groups))):
        merged[place % limit] += groups[group]
    return merged


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def seeds_interval(values: Sequence[float], maximum: float) -> Interval | NoInterval:
    """The 95 % interval of a mean over seeds: Student's t on Wilson's form, in 0..maximum."""
    from scipy import stats

    seeds = len(values)
    if seeds < MIN_SEEDS:
        return NoInterval(f"too few: {seeds} seed{'s' * (seeds != 1)}")
    mean = min(max(float(np.mean(values)) / maximum, 0.0), 1.0)
    variance = float(np.var(np.asarray(values) / maximum, ddof=1)) / seeds
    if variance <= TINY:
        return NoInterval("all seeds alike")
    student = float(stats.t.ppf(0.975, seeds - 1))
    low, high = wilson(mean, mean * (1 - mean) / variance, student)
    return Interval(float(low) * maximum, float(high) * maximum, f"Student's t, {seeds} seeds")
