"""What the controlled study compares: scores of questions, and when a model uses its picture.

values, pictures = question_values(kept, ["mamba+mlp+s0", "mamba+mlp+s1"], OUTCOMES["many"])
begin = begins(kept, names)         # hierarchical draws of the update, and each seed's own
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.controlled.design import SIGNS
from harness.controlled.records import Records
from harness.scoring.hierarchical import DRAWS, over_seeds
from vlmamba_core.errors import UserError

EXISTENCE = "existence"
THRESHOLD = 0.05  # nats a label that another picture must cost: the model uses its own
Row = Mapping[str, Any]  # the columns of one question


@dataclass(frozen=True)
class Outcome:
    """A task's questions, or those of them that `chosen` takes; retrieval's have kind, k, distance.

    source: where a cell's record has them (retrieval's text-only control has its own).
    """

    name: str
    says: str
    task: str
    chosen: Callable[[Row], bool] | None = None
    source: str = ""


def _signs(row: Row) -> bool:
    return row["kind"] != EXISTENCE


RETRIEVAL = (
    Outcome(SIGNS, "retrieval: what is on the sign", SIGNS, _signs),
    Outcome("few", "retrieval, k 1 to 4", SIGNS, lambda row: _signs(row) and int(row["k"]) <= 4),
    Outcome(
        "many",
        "retrieval, k 8 and 16",
        SIGNS,
        lambda row: _signs(row) and int(row["k"]) >= 8,
    ),
    Outcome("existence", "existence, same scenes", SIGNS, lambda row: not _signs(row)),
)


def benchmark(task: str) -> Outcome:
    """All questions of a benchmark."""
    return Outcome(task, task, task)


def part(column: str, value: Any, signs: bool = True, source: str = "") -> Outcome:
    """Retrieval's questions with a value in a column, about signs or about existence."""
    return Outcome(
        f"{column}={value}",
        str(value),
        SIGNS,
        lambda row: row[column] == value and _signs(row) == signs,
        source,
    )


def outcomes(kept: Records) -> list[Outcome]:
    """Retrieval's, then each benchmark that the cells were asked."""
    asked = [task for task in kept.questions if task != SIGNS]
    return [*RETRIEVAL, *map(benchmark, sorted(asked))]


def check_questions(kept: Records, cells: Sequence[str], outcome: Outcome) -> None:
    """Raise UserError where those of the cells that were asked were not asked the same."""
    asked = [kept.cells[cell]["tasks"].get(outcome.source or outcome.task) for cell in cells]
    if len({entry["digest"] for entry in asked if entry is not None}) > 1:
        raise UserError(f"{', '.join(cells)} were not asked the same questions of {outcome.task}")


def question_values(
    kept: Records, cells: Sequence[str], outcome: Outcome
) -> tuple[NDArray[np.float64], list[int]]:
    """Scores (cells, questions), nan where there is none, and each question's picture.

    Raises UserError where the cells were not asked the same.
    """
    check_questions(kept, cells, outcome)
    entries = [kept.cells[cell]["tasks"][outcome.source or outcome.task] for cell in cells]
    columns = kept.questions[outcome.task]
    count = min(len(entries[0]["scores"]), len(columns["picture"]))
    rows = ({name: values[at] for name, values in columns.items()} for at in range(count))
    chosen = [at for at, row in enumerate(rows) if outcome.chosen is None or outcome.chosen(row)]
    scores = np.array([[entry["scores"][at] for at in chosen] for entry in entries], dtype=float)
    return scores, [columns["picture"][at] for at in chosen]


def chance(kept: Records, outcome: Outcome) -> float:
    """What naming a random sign in view gives here, a half of existence; nan without questions."""
    columns = kept.questions[SIGNS]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    chosen = [row for row in rows if outcome.chosen is None or outcome.chosen(row)]
    chances = [0.5 if row["kind"] == EXISTENCE else row["chance_in_view"] for row in chosen]
    return float(np.mean(chances)) if chances else float("nan")


@dataclass(frozen=True)
class Begin:
    """From which update on a model uses its picture: each seed's, and draws of their mean.

    steps: the updates at which it was looked; a seed that never did counts as one look beyond.
    """

    seeds: list[int]
    draws: NDArray[np.float64]
    steps: list[int]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.seeds))


def begins(kept: Records, cells: Sequence[str], seed: int = 0) -> Begin:
    """The first looked-at update from which on the mean gain stays at THRESHOLD or above.

    Draws take held-out samples and seeds with replacement, as `hierarchical` does.
    """
    logs = [kept.cells[cell]["training"]["finetune"]["picture_gains"] for cell in cells]
    steps = [step for step, _ in logs[0]]
    gains = np.array([[row for _, row in log] for log in logs], dtype=float)  # (S, T, N)
    gains = gains[:, :, ~np.isnan(gains).any(axis=(0, 1))]
    places = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else steps[-1])]
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(gains.shape[2], [1 / gains.shape[2]] * gains.shape[2], size=DRAWS)
    means = drawn @ gains.transpose(0, 2, 1) / gains.shape[2]  # (S, DRAWS, T)
    at = np.array(places)[_first_that_stays(means)].T  # (DRAWS, S)
    own = np.array(places)[_first_that_stays(gains.mean(axis=2))]
    draws = over_seeds(at.astype(float), own.astype(float), generator)
    return Begin(own.tolist(), draws, places)


def _first_that_stays(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """Means (..., T) -> the first place from which on all are at THRESHOLD or above; T: none."""
    above = np.flip(np.cumprod(np.flip(means >= THRESHOLD, axis=-1), axis=-1), axis=-1)
    return means.shape[-1] - above.sum(axis=-1)
