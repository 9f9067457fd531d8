"""The paired difference of two runs on the same questions: its size, interval and p-value.

    paired([1, 0, 1, 1], [1, 0, 0, 0], clusters=["a", "a", "b", "b"])

Questions about one image are not independent, so an image (cluster) is the unit throughout.  The
interval is cluster-robust: with S_c the summed difference of a cluster and n_c its questions,
residuals S_c - n_c * mean have the variance that the mean's error is made of; Student's t with one
degree of freedom less than clusters, cut to -1..1.  Fewer than ten clusters are too few for it;
where no cluster differs, its bound is Wilson's of none among so many.  The p-value is of the
sign-flip test: were the two runs alike, a cluster's difference would be as likely with the other
sign.  It is exact where all differences are whole numbers (right or wrong answers), else from
random flips.  With one question an image the first is the paired t interval, and the second
McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.scoring.intervals import MIN_CLUSTERS, wilson

FLIPS = 20_000
EXACT_STEPS = 200_000_000  # clusters times range of sums, above which flips are drawn


@dataclass(frozen=True)
class Paired:
    """`difference` = mean of a - mean of b, over n questions in `clusters` clusters.

    low, high: 95 % interval; None where there are too few clusters.  better, worse: questions on
    which a's score is above, below b's.
    """

    difference: float
    low: float | None
    high: float | None
    p_value: float
    n: int
    clusters: int
    better: int
    worse: int
    method: str


def paired(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0
) -> Paired:
    """Compare two runs' scores of the same questions, in the same order (n >= 1)."""
    differences = np.asarray(a, float) - np.asarray(b, float)
    _, member = np.unique([str(c) for c in clusters], return_inverse=True)
    sums = np.bincount(member, differences)
    sizes = np.bincount(member)
    mean = float(differences.mean())
    half = _half_width(sums, sizes, mean)
    p_value, method = _sign_flip(sums, seed)
    return Paired(
        difference=mean,
        low=None if half is None else max(-1.0, mean - half),
        high=None if half is None else min(1.0, mean + half),
        p_value=p_value,
        n=len(differences),
        clusters=len(sums),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        method=f"cluster-robust t interval; {method}",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values such that comparing each with 0.05 keeps the chance of
    one false difference among all of them below that (Holm, 1979).
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def _half_width(sums: np.ndarray, sizes: np.ndarray, mean: float) -> float | None:
    """Half of the 95 % interval of the mean difference."""
    from scipy import stats

    groups = len(sums)
    if groups < MIN_CLUSTERS:
        return None
    spread = math.sqrt(float(((sums - sizes * mean) ** 2).sum()) * groups / (groups - 1))
    if spread == 0:
        return float(wilson(0.0, groups)[1])
    return float(stats.t.ppf(0.975, groups - 1)) * spread / float(sizes.sum())


def _sign_flip(sums: np.ndarray, seed: int) -> tuple[float, str]:
    """(two-sided p-value, how it was made)."""
    told = np.abs(sums[np.abs(sums) > 1e-12])
    observed = abs(float(sums.sum()))
    whole = np.allclose(told, np.round(told), atol=1e-9)
    if whole and len(told) * told.sum() <= EXACT_STEPS:
        return _exact(np.round(told).astype(int), round(observed)), "exact sign-flip test"
    return _drawn(told, observed, seed), f"sign-flip test, {FLIPS} draws"


def _exact(sizes: np.ndarray, observed: int) -> float:
    """P(|sum of +-sizes| >= observed) by adding one cluster after the other."""
    reach = int(sizes.sum())
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for size in sizes:  # rolling never wraps: no sum goes beyond `reach`
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    totals = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chances[totals >= observed].sum()))


def _drawn(sizes: np.ndarray, observed: float, seed: int) -> float:
    """The share of random flips at least as far from zero, the observed one among them."""
    generator = np.random.default_rng(seed)
    far = 0
    for _ in range(FLIPS // 1000):
        signs = generator.choice((-1.0, 1.0), size=(1000, len(sizes)))
        far += int((np.abs(signs @ sizes) >= observed - 1e-9).sum())
    return (far + 1) / (FLIPS + 1)
