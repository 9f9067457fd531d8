"""How cost grows with sequence length: exponents, slopes and crossovers, with 95 % intervals.

    power_law([256, 512, 1024], [0.1, 0.2, 0.4])      # Fit(value=1.0, low=..., high=..., n=3)

An exponent is the slope of a straight line through log(cost) against log(length) by ordinary least
squares; its interval is the slope's by Student's t with n - 2 degrees of freedom, so that two
points give none.  A cost that is no pure power (attention: linear plus quadratic) has no single
exponent: the fit is then its mean growth over the lengths measured, and `last_step` the growth at
their long end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """A slope and its 95 % interval (None of fewer than three points) from n points."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Step:
    """From one length to the next the cost grows `factor`-fold."""

    start: int
    end: int
    factor: float


def line(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The slope of y over x; None of fewer than two different x."""
    n = len(x)
    if len(set(x)) < 2:
        return None
    # By hand: scipy's linregress has NaN for the interval of a constant cost, which a Mamba state
    # is, and numpy's polyfit a slope of 1e-16 for it.
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if n < 3:
        return Fit(slope, None, None, n)
    from scipy.stats import t  # takes half a second to load

    misses = (b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True))
    error = math.sqrt(sum(miss**2 for miss in misses) / (n - 2) / spread)
    half = float(t.ppf(0.975, n - 2)) * error
    return Fit(slope, slope - half, slope + half, n)


def power_law(lengths: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """The exponent of cost over length; costs without a logarithm are left out.

    None of fewer than three lengths: a line through two points fits whatever they are.
    """
    pairs = [(math.log(x), math.log(y)) for x, y in zip(lengths, costs, strict=True) if y > 0]
    if len({x for x, _ in pairs}) < 3:
        return None
    return line([x for x, _ in pairs], [y for _, y in pairs])


def last_step(costs: Mapping[int, float]) -> Step | None:
    """Growth between the two greatest lengths; None of a single one."""
    if len(costs) < 2:
        return None
    start, end = sorted(costs)[-2:]
    return Step(start, end, costs[end] / costs[start])


@dataclass(frozen=True)
class Crossover:
    """The length from which on a model costs less than a baseline; None: not within the lengths.

    `note` says which case it is, in words.  at_most: the model costs less at every length, so that
    the two cross below `length`, the shortest measured, if at all.
    """

    length: float | None
    note: str
    at_most: bool = False


def crossover(model: Mapping[int, float], baseline: Mapping[int, float]) -> Crossover:
    """Where two costs by length cross, between measured lengths by a straight line in logarithms.

    The model may win, lose and win again; what counts is the last time it starts to win for good.
    """
    lengths = sorted(model.keys() & baseline.keys())
    if not lengths:
        return Crossover(None, "no common length was measured")
    gaps = [math.log(baseline[n] / model[n]) for n in lengths]  # above 0: the model costs less
    if gaps[-1] <= 0:
        return Crossover(None, f"not up to {lengths[-1]} tokens, the longest both were measured at")
    losing = [place for place, gap in enumerate(gaps) if gap <= 0]
    if not losing:
        note = f"already at {lengths[0]} tokens, the shortest measured: they cross below, if at all"
        return Crossover(float(lengths[0]), note, at_most=True)
    left, right = losing[-1], losing[-1] + 1
    share = -gaps[left] / (gaps[right] - gaps[left])
    logs = [math.log(lengths[place]) for place in (left, right)]
    length = math.exp(logs[0] + share * (logs[1] - logs[0]))
    return Crossover(length, f"between {lengths[left]} and {lengths[right]} tokens")
