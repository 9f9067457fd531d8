"""How often a benchmark's 95 % interval holds the true score, by simulation.

    python tools/coverage.py                      # the table of docs/INTERVALS.md, under a minute
    python tools/coverage.py --data-sets 20000 --seed 1

A data set is some pictures with questions about each, kept as sums per picture: right answers for
accuracy; true positives and mistakes for F1; the mean of acc and acc+ for MME's score; one number
for CIDEr.  Answers about one picture are right with a chance that is the picture's own, drawn from
a beta distribution, which correlates them by `rho`.  A line is of some cells, its coverage their
lowest and highest; beside it that of the percentile bootstrap over pictures, which the harness does
not use.  The exit code is 1 where a coverage is outside the line's aim.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.scoring.intervals import Sampled, share_interval
from vlmamba_core.cli import cli
from vlmamba_core.errors import UserError

DRAWS = 1000
ACCURACY_AIM, CIDER_AIM = (0.92, 0.985), (0.90, 0.97)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """What is simulated: `pictures` in each of `subtasks`, with `questions` each."""

    metric: str
    truth: float  # as a share of the metric's largest value
    rho: float
    pictures: int
    questions: int
    subtasks: int = 1
    aim: tuple[float, float] | None = ACCURACY_AIM

    @property
    def title(self) -> str:
        """The metric, and what its line is about."""
        if self.metric == "cider":
            return f"CIDEr, {self.rho:.0%} of captions 0" if self.rho else "CIDEr"
        if self.aim is None:
            return f"accuracy {self.truth}, correlation {self.rho}"
        return {"f1": "F1", "mme": "MME score"}.get(self.metric, self.metric)

    @property
    def sampled(self) -> Sampled:
        """What the harness would know of it."""
        clusters = self.pictures * self.subtasks
        alone = self.metric in ("accuracy", "f1")
        size = self.questions if alone else 1
        return Sampled(clusters, clusters * size, size)


@dataclass(frozen=True)
class Sums:
    """Data sets (first axis) as the sums a score is the ratio of; (D, pictures) each.

    kinds: (data sets, kinds of answer) counts; steps: what an answer of each kind adds to both.
    """

    above: Floats
    below: Floats
    kinds: NDArray[np.int64]
    steps: Sequence[tuple[float, float]]


def cells() -> Iterator[Cell]:
    """Every line of the table."""
    for metric in ("accuracy", "f1"):
        for truth in (0.90, 0.95):
            for rho in (0.1, 0.2):
                for pictures, questions in ((72, 6), (72, 2), (20, 6), (10, 6), (20, 2), (10, 2)):
                    yield Cell(metric, truth, rho, pictures, questions)
    for truth in (0.6, 0.8, 0.9, 0.95):
        for rho in (0.1, 0.2):
            for subtasks, pictures in ((1, 10), (1, 20), (1, 72), (10, 20)):
                yield Cell("mme", truth, rho, pictures, 2, subtasks)
    for zeros in (0.0, 0.2):
        for pictures in (10, 20, 72, 150):
            yield Cell("cider", 0.1 * (1 - zeros), zeros, pictures, 1, aim=CIDER_AIM)
    for rho, pictures, questions in ((0.0, 10, 18), (0.4, 10, 6), (0.4, 10, 18), (0.4, 72, 6)):
        yield Cell("accuracy", 0.9, rho, pictures, questions, aim=None)


def answers(cell: Cell, data_sets: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """(D, pictures, questions): which are right."""
    shape = (data_sets, cell.pictures * cell.subtasks)
    chance = np.full(shape, cell.truth)
    if cell.rho:
        strength = (1 - cell.rho) / cell.rho
        chance = generator.beta(cell.truth * strength, (1 - cell.truth) * strength, shape)
    return generator.random((*shape, cell.questions)) < chance[..., None]


def accuracy(cell: Cell, data_sets: int, generator: np.random.Generator) -> tuple[Sums, float]:
    """Right answers of all."""
    right = answers(cell, data_sets, generator).sum(2)
    total = right.sum(1)
    kinds = np.stack([total, right.shape[1] * cell.questions - total], 1)
    below = np.full(right.shape, float(cell.questions))
    return Sums(right.astype(float), below, kinds, [(1, 1), (0, 1)]), cell.truth


def f1(cell: Cell, data_sets: int, generator: np.random.Generator) -> tuple[Sums, float]:
    """Half of a picture's questions have the answer yes; F1 is 2 TP / (2 TP + mistakes)."""
    right = answers(cell, data_sets, generator)
    true_yes = right[..., : cell.questions // 2].sum(2)
    mistakes = (~right).sum(2)
    kinds = np.stack([true_yes.sum(1), mistakes.sum(1)], 1)
    rest = right.shape[1] * cell.questions - kinds.sum(1, keepdims=True)
    sums = Sums(
        2.0 * true_yes,
        2.0 * true_yes + mistakes,
        np.concatenate([kinds, rest], 1),
        [(2, 2), (0, 1), (0, 0)],
    )
    return sums, cell.truth  # TP are truth / 2 of all questions, mistakes 1 - truth


def mme(cell: Cell, data_sets: int, generator: np.random.Generator) -> tuple[Sums, float]:
    """(acc + acc+) / 2, the mean over subtasks of equal size."""
    right = answers(cell, data_sets, generator)
    scores = (right.mean(2) + right.all(2)) / 2
    both = cell.truth * (cell.truth + (1 - cell.truth) * cell.rho)
    none = np.zeros((data_sets, 0), np.int64)
    return Sums(scores, np.ones_like(scores), none, []), (cell.truth + both) / 2


def cider(cell: Cell, data_sets: int, generator: np.random.Generator) -> tuple[Sums, float]:
    """A skewed score a picture (gamma, shape 1.5), as a share of 10; `rho` of them are zero."""
    shape = (data_sets, cell.pictures)
    mean = cell.truth / (1 - cell.rho)
    scores = generator.gamma(1.5, mean / 1.5, shape) * (generator.random(shape) >= cell.rho)
    return Sums(scores, np.ones(shape), np.zeros((data_sets, 0), np.int64), []), cell.truth


SIMULATED: dict[str, Callable[[Cell, int, np.random.Generator], tuple[Sums, float]]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mme": mme,
    "cider": cider,
}


def variances(sums: Sums, subtasks: int = 1) -> tuple[Floats, Floats, Floats | None]:
    """(value, variance by leaving out pictures, by leaving out answers) of each data set.

    With subtasks the value is the mean of theirs, and a picture is left out of its own alone.
    """
    above, below = (_by_subtask(part, subtasks) for part in (sums.above, sums.below))
    totals = above.sum(2, keepdims=True), below.sum(2, keepdims=True)
    each = totals[0] / totals[1]
    without = (totals[0] - above) / (totals[1] - below)
    pictures = sums.above.shape[1]
    shift = (without - each) / subtasks
    between = (pictures - 1) / pictures * np.square(shift).sum((1, 2))
    value = each.mean((1, 2))
    if not sums.steps:
        return value, between, None
    n = sums.kinds.sum(1)
    steps = np.asarray(sums.steps, float).T
    rest = (sums.above.sum(1, keepdims=True) - steps[0]) / (
        sums.below.sum(1, keepdims=True) - steps[1]
    )
    squares = sums.kinds * np.square(rest - value[:, None])
    return value, between, (n - 1) / n * squares.sum(1)


def _by_subtask(values: Floats, subtasks: int) -> Floats:
    return values.reshape(len(values), subtasks, -1)


def percentile(sums: Sums, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """The percentile bootstrap over pictures; its draws serve all data sets."""
    pictures = sums.above.shape[1]
    weights = generator.multinomial(pictures, np.full(pictures, 1 / pictures), DRAWS)
    drawn = (weights @ sums.above.T) / (weights @ sums.below.T)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return low, high


def coverage(cell: Cell, data_sets: int, seed: int) -> tuple[float, float]:
    """(the harness's interval, the percentile bootstrap's): shares that hold the truth."""
    generator = np.random.default_rng([seed, *f"{cell}".encode()])
    sums, truth = SIMULATED[cell.metric](cell, data_sets, generator)
    value, between, within = variances(sums, cell.subtasks)
    low, high, _ = share_interval(value, between, within, cell.sampled)
    return _holds(low, high, truth), _holds(*percentile(sums, generator), truth)


def _holds(low: Floats, high: Floats, truth: float) -> float:
    return float(((low <= truth + 1e-12) & (truth <= high + 1e-12)).mean())


def lines(found: Iterator[Cell]) -> list[list[Cell]]:
    """Cells that differ in truth and correlation alone, together."""
    groups: dict[Hashable, list[Cell]] = {}
    for cell in found:
        key = (cell.title, cell.pictures, cell.questions, cell.subtasks)
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def _spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a coverage is outside its aim."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-sets", type=int, default=10_000, help="a cell (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.data_sets < 1:
        raise UserError("--data-sets must be at least 1")
    print("| metric | pictures | questions | coverage | percentile bootstrap | aim |")
    print("|---" * 6 + "|")
    failed = False
    for group in lines(cells()):
        found, bootstrap = zip(
            *(coverage(c, args.data_sets, args.seed) for c in group), strict=True
        )
        first = group[0]
        missed = (
            first.aim is not None and not first.aim[0] <= min(found) <= max(found) <= first.aim[1]
        )
        failed |= missed
        aim = f"{first.aim[0]} to {first.aim[1]}" if first.aim else "none"
        pictures = f"{first.subtasks} x " * (first.subtasks > 1) + str(first.pictures)
        print(
            f"| {first.title} | {pictures} | {first.questions} | {_spread(found)} "
            f"| {_spread(bootstrap)} | {aim + ', missed' * missed} |"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
