"""Differences between the study's models: of families, connectors, both at once, and orders.

A contrast is a weighted sum of models, by question and seed, so that it is paired throughout; its
interval and p-value are of `harness.scoring.hierarchical`.  Within a table the p-values are
corrected for the number of its comparisons (Holm).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harness.controlled.design import NANO, SCALES
from harness.controlled.outcomes import Begin, Outcome, begins, check_questions, question_values
from harness.controlled.records import Records
from harness.scoring.hierarchical import Drawn, hierarchical
from harness.scoring.paired import holm

REFERENCE = "mamba"
Model = tuple[str, str, str]  # family, connector, order


@dataclass(frozen=True)
class Contrast:
    """says: how a table calls it.  terms: (weight, model); the weights add up to zero."""

    says: str
    terms: tuple[tuple[float, Model], ...]


def seeds_of(kept: Records, model: Model) -> dict[int, str]:
    """Seed -> name of the cell, of those that are finished."""
    return {
        record["seed"]: name
        for name, record in kept.cells.items()
        if (record["family"], record["connector"], record["order"]) == model
    }


def models(kept: Records, order: str | None = "") -> list[Model]:
    """Those with a finished cell, families and connectors in the order of their first one.

    order: None for those of every order.
    """
    found = {(r["family"], r["connector"], r["order"]) for r in kept.cells.values()}
    chosen = [model for model in found if order in (None, model[2])]
    return sorted(chosen, key=lambda model: (*_places(model), model))


def _places(model: Model) -> tuple[int, int]:
    known = tuple(family.name for family in NANO), SCALES["demo"].connectors
    pairs = zip(known, model, strict=False)
    a, b = (names.index(name) if name in names else len(names) for names, name in pairs)
    return a, b


def names(kept: Records, place: int) -> list[str]:
    """Families (0) or connectors (1) of the finished cells of the usual order."""
    return list(dict.fromkeys(model[place] for model in models(kept)))


def between_families(kept: Records, a: str, b: str) -> Contrast:
    """a minus b, on average over the connectors that both have with the most seeds.

    One whose other seeds are still to come would leave the others with its few.
    """
    seeds = {
        c: len(seeds_of(kept, (a, c, "")).keys() & seeds_of(kept, (b, c, "")).keys())
        for c in names(kept, 1)
    }
    shared = [c for c, count in seeds.items() if count == max(seeds.values()) > 0]
    share = 1 / max(len(shared), 1)
    plus = [(share, (a, c, "")) for c in shared]
    return Contrast(f"{a} - {b}", (*plus, *((-share, (b, c, "")) for c in shared)))


def between_connectors(kept: Records, a: str, b: str, families: Sequence[str] = ()) -> Contrast:
    """a minus b, on average over the families that have both."""
    had = set(models(kept))
    chosen = families or names(kept, 0)
    shared = [f for f in chosen if {(f, a, ""), (f, b, "")} <= had]
    share = 1 / max(len(shared), 1)
    plus = [(share, (f, a, "")) for f in shared]
    said = f"{a} - {b}" + (f" on {', '.join(families)}" if families else "")
    return Contrast(said, (*plus, *((-share, (f, b, "")) for f in shared)))


def interaction(connectors: tuple[str, str], families: tuple[str, str]) -> Contrast:
    """What a connector gains over another with one family, minus what it gains with another one."""
    (a, b), (one, other) = connectors, families
    terms = ((1.0, (one, a, "")), (-1.0, (one, b, "")), (-1.0, (other, a, "")))
    return Contrast(f"({a} - {b}) on {one} - on {other}", (*terms, (1.0, (other, b, ""))))


def of_order(family: str, connector: str, order: str) -> Contrast:
    """An order of the prompt minus the usual one."""
    usual, changed = (family, connector, ""), (family, connector, order)
    return Contrast(f"{family}, {order}", ((1.0, changed), (-1.0, usual)))


def drawn(kept: Records, contrast: Contrast, outcome: Outcome) -> Drawn | None:
    """The contrast on an outcome, over the seeds that all its models have; None without any."""
    seeds = _shared_seeds(kept, contrast)
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
    seeds = _shared_seeds(kept, contrast)
    if not seeds:
        return None
    parts: list[tuple[float, Begin]] = []
    for weight, model in contrast.terms:
        cells = [seeds_of(kept, model)[seed] for seed in seeds]
        parts.append((weight, begins(kept, cells)))
    mean = sum(weight * begin.mean for weight, begin in parts)
    return mean, np.sum([weight * begin.draws for weight, begin in parts], axis=0), len(seeds)


def _shared_seeds(kept: Records, contrast: Contrast) -> list[int]:
    """Seeds that every model of the contrast has; none of a contrast without models."""
    had = [set(seeds_of(kept, model)) for _, model in contrast.terms]
    return sorted(set.intersection(*had)) if had else []


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
