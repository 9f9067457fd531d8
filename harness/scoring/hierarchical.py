"""A mean over seeds, pictures and questions, with an interval that speaks of others of all three.

    found = hierarchical(values, pictures)        # values (seeds, questions); nan: no such score

Hierarchical bootstrap: a draw takes seeds with replacement, pictures with replacement, and of each
drawn picture as many of its questions as it has, with replacement.  Where `values` are differences
of two models on the same question with the same seed, the comparison is paired throughout.  With S
seeds the bootstrap's variance between seeds is (S - 1) / S of what it estimates; the seeds' means
are therefore spread by sqrt(S / (S - 1)) around their own mean before they are drawn (Davison and
Hinkley, Bootstrap Methods, 1997, section 2.1).  One seed says nothing of others: then the interval
is over pictures and questions alone.  The p-value is twice the smaller share of draws on either
side of zero, each with one draw added, which a sample of DRAWS cannot bring below 2 / (DRAWS + 1).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drawn:
    """mean, and `draws` of it (DRAWS,); seeds, pictures and questions that it is of."""

    mean: float
    draws: Floats
    seeds: int
    pictures: int
    questions: int

    def interval(self, alpha: float = 0.05) -> tuple[float, float]:
        """The percentiles between which 1 - alpha of the draws lie."""
        low, high = np.quantile(self.draws, [alpha / 2, 1 - alpha / 2])
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Of the hypothesis that the mean is zero, two-sided."""
        below, above = int((self.draws <= 0).sum()), int((self.draws >= 0).sum())
        return min(1.0, 2 * (min(below, above) + 1) / (len(self.draws) + 1))


def hierarchical(values: Floats, pictures: Sequence[Hashable], *, seed: int = 0) -> Drawn:
    """The mean of values (S, Q), whose questions belong to `pictures` (Q,), with its draws.

    A question without a value in some seed is left out of all.  Raises ValueError where none is
    left.
    """
    told = np.array([not np.isnan(question).any() for question in np.asarray(values).T])
    kept = np.asarray(values, float)[:, told]
    if not kept.size:
        raise ValueError("no question has a value with every seed")
    names = [str(p) for p, use in zip(pictures, told, strict=True) if use]
    _, member = np.unique(np.array(names), return_inverse=True)
    kept, sizes = kept[:, np.argsort(member, kind="stable")], np.bincount(member)
    weights = _question_weights(tuple(sizes.tolist()), seed)
    by_seed = (weights @ kept.T) / weights.sum(axis=1)[:, None]  # (DRAWS, S)
    generator = np.random.default_rng((seed, 1))
    draws = over_seeds(by_seed, kept.mean(axis=1), generator)
    return Drawn(float(kept.mean()), draws, len(kept), len(sizes), kept.shape[1])


def over_seeds(by_seed: Floats, means: Floats, generator: np.random.Generator) -> Floats:
    """(draws, S) of each seed, and their own means (S,) -> one mean over drawn seeds a draw."""
    draws, seeds = by_seed.shape
    if seeds == 1:
        return by_seed[:, 0]
    wider = np.sqrt(seeds / (seeds - 1))
    spread = by_seed + (wider - 1) * (means - means.mean())
    chosen = generator.integers(seeds, size=(draws, seeds))
    return np.take_along_axis(spread, chosen, axis=1).mean(axis=1)


@functools.lru_cache(maxsize=24)  # many comparisons are of the same questions
def _question_weights(sizes: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """(DRAWS, Q): how often each question is drawn, pictures' questions behind each other."""
    each, total = np.array(sizes), sum(sizes)
    starts, generator = np.cumsum(each) - each, np.random.default_rng(seed)
    weights = np.empty((DRAWS, total), dtype=np.float32)
    for draw in weights:
        drawn = generator.integers(len(each), size=len(each))
        size, start = np.repeat(each[drawn], each[drawn]), np.repeat(starts[drawn], each[drawn])
        chosen = start + (generator.random(len(size)) * size).astype(int)
        draw[:] = np.bincount(chosen, minlength=total)
    return weights
