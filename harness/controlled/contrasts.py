"""Differences between the study's models: of families, connectors, both at once, orders, starts.

A contrast is a weighted sum of models, by question and seed, so that it is paired throughout; its
interval and p-value are of `harness.scoring.hierarchical`.  Within a table the p-values are
corrected for the number of its comparisons (Holm).  All models of a contrast started from the same
text pretrainings (their `start`), but for those that compare two of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.controlled.design import NANO, SCALES
from harness.controlled.outcomes import Begin, Outcome, begins, check_questions, question_values
from harness.controlled.records import Records
from harness.scoring.hierarchical import Drawn, hierarchical
from harness.scoring.paired import holm

REFERENCE = "mamba"
Model = tuple[str, str, str, int]  # family, connector, order, start: which text pretraining, from 1


@dataclass(frozen=True)
class Contrast:
    """says: how a table calls it.  terms: (weight, model); the weights add up to zero."""

    says: str
    terms: tuple[tuple[float, Model], ...]


def seeds_of(kept: Records, model: Model) -> dict[int, str]:
    """Seed -> name of the cell, of those that are finished."""
    return {
        record["seed"]: name for name, record in kept.cells.items() if model_of(record) == model
    }


def model_of(cell: Mapping[str, Any]) -> Model:
    """Of a cell's record."""
    return cell["family"], cell["connector"], cell["order"], cell["start"]


def models(kept: Records, order: str | None = "", start: int | None = None) -> list[Model]:
    """Those with a finished cell, families and connectors in the design's order.

    order, start: None for those of every one.
    """
    found = {model_of(record) for record in kept.cells.values()}
    chosen = [m for m in found if order in (None, m[2]) and start in (None, m[3])]
    return sorted(chosen, key=lambda model: (*_places(model), model))


def _places(model: Model) -> tuple[int, int]:
    known = tuple(family.name for family in NANO), SCALES["demo"].connectors
    pairs = zip(known, model, strict=False)
    a, b = (names.index(name) if name in names else len(names) for names, name in pairs)
    return a, b


def names(kept: Records, place: int, start: int | None = None) -> list[str]:
    """Families (0) or connectors (1) of the finished cells of the usual order."""
    return list(dict.fromkeys(str(model[place]) for model in models(kept, start=start)))


def starts(kept: Records) -> list[int]:
    """The text pretrainings that finished cells started from."""
    return sorted({cell["start"] for cell in kept.cells.values()})


def between_families(kept: Records, a: str, b: str, start: int = 1) -> Contrast:
    """a minus b, on average over the connectors that both have with the most seeds.

    One whose other seeds are still to come would leave the others with its few.
    """
    seeds = {
        c: len(seeds_of(kept, (a, c, "", start)).keys() & seeds_of(kept, (b, c, "", start)).keys())
        for c in names(kept, 1, start)
    }
    shared = [c for c, count in seeds.items() if count == max(seeds.values()) > 0]
    share = 1 / max(len(shared), 1)
    plus = [(share, (a, c, "", start)) for c in shared]
    return Contrast(f"{a} - {b}", (*plus, *((-share, (b, c, "", start)) for c in shared)))


def between_connectors(kept: Records, a: str, b: str, start: int = 1) -> Contrast:
    """a minus b, on average over the families that have both."""
    had = set(models(kept, start=start))
    shared = [f for f in names(kept, 0, start) if {(f, a, "", start), (f, b, "", start)} <= had]
    share = 1 / max(len(shared), 1)
    plus = [(share, (f, a, "", start)) for f in shared]
    return Contrast(f"{a} - {b}", (*plus, *((-share, (f, b, "", start)) for f in shared)))


def interaction(connectors: tuple[str, str], families: tuple[str, str], start: int = 1) -> Contrast:
    """What a connector gains over another with one family, minus what it gains with another one."""
    (a, b), (one, other) = connectors, families
    gain = ((1.0, (one, a, "", start)), (-1.0, (one, b, "", start)))
    other_gain = ((-1.0, (other, a, "", start)), (1.0, (other, b, "", start)))
    return Contrast(f"({a} - {b}) on {one} - on {other}", (*gain, *other_gain))


def of_order(family: str, connector: str, order: str, start: int = 1) -> Contrast:
    """An order of the prompt minus the usual one."""
    usual, changed = (family, connector, "", start), (family, connector, order, start)
    return Contrast(f"{family}, {order}", ((1.0, changed), (-1.0, usual)))


def between_starts(family: str, connector: str, a: int, b: int) -> Contrast:
    """The same cells from text pretraining a minus from b: what it alone changes."""
    plus, minus = (family, connector, "", a), (family, connector, "", b)
    return Contrast(f"{family}, {connector}", ((1.0, plus), (-1.0, minus)))


def drawn(kept: Records, contrast: Contrast, outcome: Outcome) -> Drawn | None:
    """The contrast on an outcome, over the seeds that all its models have; None without any."""
    seeds = shared_seeds(kept, contrast)
    if not seeds:
        return None
    terms = [(w, [seeds_of(kept, m)[seed] for seed in seeds]) for w, m in contrast.terms]
    check_questions(kept, [cell for _, cells in terms for cell in cells], outcome)
    total: np.ndarray | float = 0.0
    pictures: list[int] = []
    for weight, cells in terms:
        if any((outcome.source or outcome.task) not in kept.cells[c]["tasks"] for c in cells):
            return None
        values, pictures = question_values(kept, cells, outcome)
        total = total + weight * values
    values = np.asarray(total)
    return None if np.isnan(values).any(axis=0).all() else hierarchical(values, pictures)


def begin_difference(kept: Records, contrast: Contrast) -> tuple[float, np.ndarray, int] | None:
    """(difference, its draws, seeds) of the updates until the picture is used."""
    seeds = shared_seeds(kept, contrast)
    if not seeds:
        return None
    parts: list[tuple[float, Begin]] = []
    for weight, model in contrast.terms:
        cells = [seeds_of(kept, model)[seed] for seed in seeds]
        parts.append((weight, begins(kept, cells)))
    mean = sum(weight * begin.mean for weight, begin in parts)
    return mean, np.sum([weight * begin.draws for weight, begin in parts], axis=0), len(seeds)


def shared_seeds(kept: Records, contrast: Contrast) -> list[int]:
    """Seeds that every model of the contrast has; none of a contrast without models."""
    had = [set(seeds_of(kept, model)) for _, model in contrast.terms]
    return sorted(set.intersection(*had)) if had else []


def best_told(kept: Records, asked: Callable[[Records, int], Contrast]) -> tuple[int, Contrast]:
    """(start, its contrast) of the start with most seeds of it; the first where they are equal."""
    made = {start: asked(kept, start) for start in starts(kept) or [1]}
    start = max(made, key=lambda start: len(shared_seeds(kept, made[start])))
    return start, made[start]


@dataclass(frozen=True)
class Compared:
    """A row of a table of contrasts; corrected: the p-value after Holm's correction."""

    contrast: Contrast
    outcome: Outcome
    found: Drawn
    corrected: float


def compared(
    kept: Records, contrasts: Sequence[Contrast], outcomes: Sequence[Outcome]
) -> list[Compared]:
    """Every contrast on every outcome that it can be told of."""
    told = list(_told(kept, contrasts, outcomes))
    corrected = holm([found.p_value for _, _, found in told])
    return [Compared(*row, p) for row, p in zip(told, corrected, strict=True)]


def _told(
    kept: Records, contrasts: Sequence[Contrast], outcomes: Sequence[Outcome]
) -> Iterator[tuple[Contrast, Outcome, Drawn]]:
    for contrast in contrasts:
        for outcome in outcomes:
            found = drawn(kept, contrast, outcome)
            if found is not None:
                yield contrast, outcome, found
