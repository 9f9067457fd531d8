"""How a benchmark is lmms-eval's own task too; `harness.scoring.official` asks both.

    official = Official("gqa/gqa.yaml", {"accuracy": Metric("exact_match")})

Each benchmark says it in its own class (`Benchmark.official`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """A row as it was loaded, the answer as given, what was read in it, and the reference.

    with_image: whether the question came with an image. excluded: why the row was left out.
    """

    row: Row
    answer: str
    parsed: str | None
    reference: Any
    with_image: bool
    excluded: str | None = None


def everything(_: Given) -> bool:
    """Every row."""
    return True


@dataclass(frozen=True)
class Metric:
    """A metric of lmms-eval's task, on the rows that ours of that name is over.

    `only_lmms`: the protocols define it differently. `mean_of_categories`: under `paper` it is the
    mean of its values in each category.
    """

    name: str
    rows: Callable[[Given], bool] = everything
    only_lmms: bool = False
    mean_of_categories: bool = False


@dataclass(frozen=True)
class Official:
    """A task file of lmms-eval, and its metrics under the names that they have here.

    `scale`: their values over ours. `prepare`: a row as the task wants it; adds only what it never
    scores by. `reading`: a text that it can only read as what was read here; None where its
    counting cannot be asked for alone.  `unread`: what it gets in place of an answer in which
    nothing was read here, where it would draw at random.  `digits`: to which it rounds its values.
    """

    file: str
    metrics: Mapping[str, Metric]
    scale: float = 1.0
    prepare: Callable[[Row], Row] = dict
    reading: Callable[[Given], str] | None = None
    unread: Callable[[Given], str] | None = None
    digits: int | None = None
    same_in_both: bool = False  # the protocols score alike


EXACT_MATCH = {"accuracy": Metric("exact_match")}


def word(given: Given) -> str:
    """The word that was read; another one where none was."""
    return given.parsed or "other"


def letter(given: Given) -> str:
    """The letter that was read; nothing where none was."""
    return given.parsed or ""


def option(given: Given) -> str:
    """The letter; a wrong one for an answer that is no option, where lmms-eval would go on."""
    if given.parsed in tuple("ABCDE"):
        return str(given.parsed)
    return "B" if given.row["answer"] == "A" else "A"
