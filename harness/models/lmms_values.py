"""What the aggregations of an lmms-eval task make of its rows, and which of them are means.

    values = Values.of(results, aggregate)      # results: of each row, metric -> item
    values.totals["mmmu_acc"], values.cases()[0].score

lmms-eval says neither how large a metric can be nor what a row's part in it is.  An aggregation
that gives each row alone a value from 0 to 1, and all rows the mean of these, is a mean of shares;
any other one has an interval by the jackknife alone, without a largest value.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from statistics import fmean
from typing import Any

from tasks.common import Case, Unit
from vlmamba_core.errors import first_line, one_line

SLOW_S = 0.5  # an aggregation that takes longer (one that asks a judge) is not made again and again
CLOSE = 1e-4  # of a mean: lmms-eval rounds some
Results = Mapping[str, Any]  # metric -> a row's item


class Share(float):
    """A row's part in a metric that is the mean of such."""


@dataclass
class Values:
    """totals: of all rows.  shares: each row's, of metrics that are their mean.  unit: of all."""

    results: Sequence[Results]
    totals: dict[str, float] = field(default_factory=dict)
    shares: dict[str, list[Share | None]] = field(default_factory=dict)
    no_interval: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, results: Sequence[Results], aggregate: Callable[[str, list[Any]], Any]) -> Values:
        """Aggregate every metric of the rows; what fails, or is no number, is in `notes`.

        aggregate(metric, items): lmms-eval's; it may raise anything.
        """
        values = cls(results)
        for metric in dict.fromkeys(name for result in results for name in result):
            values._add(metric, aggregate)
        return values

    @property
    def unit(self) -> Unit:
        """Fractions where every metric is a mean of shares."""
        return "fraction" if self.totals.keys() <= self.shares.keys() else "points"

    @property
    def unbounded(self) -> frozenset[str]:
        """Metrics whose largest value nobody knows."""
        return frozenset(self.totals) - frozenset(self.shares)

    @property
    def counts(self) -> dict[str, int]:
        """Metric -> the rows that it is over."""
        return {metric: sum(metric in row for row in self.results) for metric in self.totals}

    @property
    def primary(self) -> str | None:
        """The mean that most rows are in."""
        return max(self.shares, key=lambda metric: self.counts[metric], default=None)

    def cases(self) -> list[Case]:
        """Each row's score, and in `detail` what `total` needs of it."""
        return [
            Case(
                self._score(row),
                None,
                {
                    metric: self.shares[metric][row] if metric in self.shares else item
                    for metric, item in result.items()
                    if metric in self.totals and metric not in self.no_interval
                },
            )
            for row, result in enumerate(self.results)
        ]

    def _score(self, row: int) -> float | None:
        if self.primary is not None:
            return self.shares[self.primary][row]
        for item in self.results[row].values():  # lmms-eval's own custom for a row's share
            found = share(item.get("score")) if isinstance(item, Mapping) else None
            if found is not None:
                return found
        return None

    def _add(self, metric: str, aggregate: Callable[[str, list[Any]], Any]) -> None:
        items = [result[metric] for result in self.results if metric in result]
        started = time.perf_counter()
        total, why = called(aggregate, metric, items)
        seconds = time.perf_counter() - started
        if total is None:
            self.notes += [f"{metric} has no value: {why}"] * bool(why)
            return
        self.totals[metric] = total
        if seconds > SLOW_S:
            self.no_interval[metric] = "its aggregation takes too long"
            return
        found = [share(item) for item in items]
        if None in found:
            found = alone(aggregate, metric, items)
        shares = [value for value in found if value is not None]
        if len(shares) == len(items) and abs(fmean(shares) - total) < CLOSE:
            rest = iter(shares)
            self.shares[metric] = [next(rest) if metric in r else None for r in self.results]


def total(cases: Sequence[Case], aggregate: Callable[[str, list[Any]], Any]) -> dict[str, float]:
    """The metrics of some of the cases; one that cannot be made of them is left out."""
    items: dict[str, list[Any]] = {}
    for case in cases:
        for metric, item in case.detail.items():
            items.setdefault(metric, []).append(item)
    found = {
        metric: fmean(some)
        if all(isinstance(item, Share) for item in some)
        else called(aggregate, metric, some)[0]
        for metric, some in items.items()
    }
    return {metric: value for metric, value in found.items() if value is not None}


def called(
    aggregate: Callable[[str, list[Any]], Any], metric: str, items: list[Any]
) -> tuple[float | None, str]:
    """The value; None, and why there is none: nothing of one that writes a file and gives none."""
    try:
        value = aggregate(metric, items)
    except Exception as error:  # another's code, on rows that it may not be made for
        return None, one_line(f"{type(error).__name__}: {first_line(error)}")
    if value is None:
        return None, ""
    if not isinstance(value, Real) or not math.isfinite(value):
        return None, f"lmms-eval gives {one_line(repr(value))[:60]}"
    return float(value), ""


def alone(
    aggregate: Callable[[str, list[Any]], Any], metric: str, items: list[Any]
) -> list[Share | None]:
    """Each item's own value, up to the first that is no share."""
    found: list[Share | None] = []
    for item in items:
        found.append(share(called(aggregate, metric, [item])[0]))
        if found[-1] is None:
            break
    return found


def share(value: Any) -> Share | None:
    """The value where it is a number from 0 to 1."""
    return Share(value) if isinstance(value, Real) and 0 <= float(value) <= 1 else None
