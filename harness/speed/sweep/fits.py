"""How cost grows with sequence length: exponents, slopes and crossovers, with 95 % intervals.

    power_law([256, 512, 1024], [0.1, 0.2, 0.4])      # Fit(value=1.0, low=..., high=..., n=3)

An exponent is the slope of a straight line through log(cost) against log(length) by ordinary least
squares; its interval is the slope's by Student's t with n - 2 degrees of freedom. A cost that is
no pure power (attention: linear plus quadratic) has no single exponent: the fit is then its mean
growth over the lengths measured, and `last_doubling` the growth at their long end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """A slope and its 95 % interval (None of fewer than three points) from n points."""

    value: float
    low: float | None
    high: float | None
    n: int


def line(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The slope of y over x; None of fewer than two different x."""
    n = len(x)
    if len(set(x)) < 2:
        return None
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if n < 3:
        return Fit(slope, None, None, n)
    from scipy.stats import t

    misses = (b - mean_y - slope * (a - mean_x) for a, b in zip(x, y, strict=True))
    error = math.sqrt(sum(miss**2 for miss in misses) / (n - 2) / spread)
    half = float(t.ppf(0.975, n - 2)) * error
    return Fit(slope, slope - half, slope + half, n)


def power_law(lengths: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """The exponent of cost over length; costs without a logarithm are left out."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(lengths, costs, strict=True) if y > 0]
    return line([x for x, _ in pairs], [y for _, y in pairs])


def last_doubling(lengths: Sequence[float], costs: Sequence[float]) -> float | None:
    """The exponent between the two greatest lengths."""
    pairs = sorted(zip(lengths, costs, strict=True))[-2:]
    fit = power_law([x for x, _ in pairs], [y for _, y in pairs])
    return None if fit is None else fit.value


@dataclass(frozen=True)
class Crossover:
    """The length from which on `ours` costs less than the other; None: not within the lengths.

    `note` says which case it is, in words.
    """

    length: float | None
    note: str


def crossover(ours: dict[int, float], theirs: dict[int, float]) -> Crossover:
    """Where two costs by length cross, between measured lengths by a straight line in logarithms.

    Ours may win, lose and win again; what counts is the last time it starts to win for good.
    """
    lengths = sorted(ours.keys() & theirs.keys())
    if not lengths:
        return Crossover(None, "no common length was measured")
    gaps = [math.log(theirs[n] / ours[n]) for n in lengths]  # above 0: ours costs less
    if gaps[-1] <= 0:
        return Crossover(None, f"not up to {lengths[-1]} tokens, the longest both were measured at")
    losing = [place for place, gap in enumerate(gaps) if gap <= 0]
    if not losing:
        return Crossover(
            float(lengths[0]), f"already at {lengths[0]} tokens, the shortest measured"
        )
    left, right = losing[-1], losing[-1] + 1
    share = -gaps[left] / (gaps[right] - gaps[left])
    logs = [math.log(lengths[place]) for place in (left, right)]
    length = math.exp(logs[0] + share * (logs[1] - logs[0]))
    return Crossover(length, f"between {lengths[left]} and {lengths[right]} tokens")
