"""Two runs question by question: differences of their scores with the paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from harness.data.questions import NO_IMAGE
from harness.reporting.render import p_text, paired_interval_text
from harness.runs.schema import Sample, with_marks
from harness.runs.store import NAMED, EvaluationRun
from harness.runs.store import marks as marks_of
from harness.scoring.paired import Paired, holm, paired
from vlmamba_core.errors import UserError

HEADERS = ("task", "mean A", "mean B", "A - B", "95 % interval", "p", "n", "images", "A/B better")


@dataclass(frozen=True)
class TaskComparison:
    """Two runs on one task: mean score of a question in each, and the paired difference.

    marks: what sets A or B apart ("B blind").
    """

    task: str
    mean_a: float
    mean_b: float
    paired: Paired
    marks: tuple[str, ...] = ()


def compare(a: EvaluationRun, b: EvaluationRun, *, seed: int = 0) -> list[TaskComparison]:
    """Every task that both runs scored. Raises UserError where they have nothing in common.

    Or where the same row asks something else: then the data differ.
    """
    shared = [task for task in a.tasks if task in b.tasks]
    found = [c for task in shared if (c := compare_task(a, b, task, seed)) is not None]
    if not found:
        raise UserError(
            f"{a.name} and {b.name} share no scored question (tasks: {', '.join(a.tasks)}; "
            f"{', '.join(b.tasks)})"
        )
    return found


def compare_task(
    a: EvaluationRun, b: EvaluationRun, task: str, seed: int = 0
) -> TaskComparison | None:
    """One task; None without questions that have a score in both runs."""
    of_a = {sample.doc_id: sample for sample in a.primary_metric_samples(task)}
    alike = asked_alike(a, b, task)
    rows = []
    for other in b.primary_metric_samples(task):
        mine = of_a.get(other.doc_id)
        if mine is None:
            continue
        if not same_question(mine, other, alike):
            raise UserError(
                f"{task}: row {other.doc_id + 1} of {a.name} and {b.name} is not the same "
                "question; compare runs on the same data"
            )
        if mine.score is not None and other.score is not None:
            known = [sample.image for sample in (mine, other) if not _is_named(sample)]
            image = known[0] if known else mine.image
            alone = image in (None, NO_IMAGE)
            rows.append((mine.score, other.score, f"row {mine.doc_id}" if alone else image))
    if not rows:
        return None
    scores_a, scores_b, images = zip(*rows, strict=True)
    n = len(rows)
    marks = [
        f"{side} {mark}"
        for side, run in (("A", a), ("B", b))
        for mark in marks_of(run.record["arguments"], task)
    ]
    test = paired(scores_a, scores_b, images, seed=seed)
    return TaskComparison(task, sum(scores_a) / n, sum(scores_b) / n, test, tuple(marks))


def asked_alike(a: EvaluationRun, b: EvaluationRun, task: str) -> bool:
    """Whether both runs put a question of the task in the same words."""
    said = [(run.record["protocol"], run.record.get("prompts", {}).get(task)) for run in (a, b)]
    return said[0] == said[1]


def same_question(mine: Sample, other: Sample, alike: bool = False) -> bool:
    """Whether two samples of one row have one reference and one picture.

    Answers that came in a file know a picture by its name, or not at all: beside those of a run,
    which know its content, the question's text has to be the same instead.
    alike: the same question is put in the same words; another's text is another question then.
    """
    if mine.reference != other.reference:
        return False
    if alike and mine.question and other.question and mine.question != other.question:
        return False
    if mine.image == other.image:
        return True
    one_by_name = _is_named(mine) != _is_named(other) or None in (mine.image, other.image)
    return one_by_name and mine.question == other.question


def _is_named(sample: Sample) -> bool:
    return sample.image is None or sample.image.startswith(NAMED)


def rows(found: Sequence[TaskComparison]) -> list[list[str]]:
    """Table cells; scores in per cent, differences in points of them."""
    return [
        [
            with_marks(c.task, c.marks),
            f"{100 * c.mean_a:.1f}",
            f"{100 * c.mean_b:.1f}",
            f"{100 * c.paired.difference:+.1f}",
            paired_interval_text(c.paired),
            p_text(c.paired.p_value),
            str(c.paired.n),
            str(c.paired.clusters),
            f"{c.paired.better}/{c.paired.worse}",
        ]
        for c in found
    ]


@dataclass(frozen=True)
class Pair:
    """Two of several runs on one task; p_corrected: by Holm over all pairs and tasks compared."""

    a: str
    b: str
    found: TaskComparison
    p_corrected: float


def letters(count: int) -> list[str]:
    """A name for each of several runs: A to Z, then R27, R28..."""
    return [chr(ord("A") + n) if n < 26 else f"R{n + 1}" for n in range(count)]


def compare_all(runs: Sequence[EvaluationRun], *, seed: int = 0) -> list[Pair]:
    """Every two runs on every task that both scored, task by task.

    Raises UserError where no two have anything in common, or where one row asks two of them
    something else.
    """
    named = list(zip(letters(len(runs)), runs, strict=True))
    tasks = dict.fromkeys(task for run in runs for task in run.tasks)
    compared = [
        (first, second, found)
        for task in tasks
        for (first, a), (second, b) in combinations(named, 2)
        if task in a.tasks and task in b.tasks
        if (found := compare_task(a, b, task, seed)) is not None
    ]
    if not compared:
        raise UserError(f"no two of {', '.join(run.name for run in runs)} share a scored question")
    corrected = holm([found.paired.p_value for _, _, found in compared])
    return [Pair(*one, p) for one, p in zip(compared, corrected, strict=True)]


def matrix(
    pairs: Sequence[Pair], task: str, runs: Sequence[EvaluationRun]
) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of a task: a row's run minus a column's in points, with the corrected p."""
    named = dict(zip(letters(len(runs)), runs, strict=True))
    cells = {}
    for pair in pairs:
        if pair.found.task == task:
            points, p = 100 * pair.found.paired.difference, p_text(pair.p_corrected)
            cells[pair.a, pair.b] = f"{points:+.1f} (p {p})"
            cells[pair.b, pair.a] = f"{-points + 0.0:+.1f} (p {p})"
    shown = [name for name in named if any(name in pair for pair in cells)]
    rows = [
        [
            with_marks(a, marks_of(named[a].record["arguments"], task)),
            *(cells.get((a, b), "" if a == b else "-") for b in shown),
        ]
        for a in shown
    ]
    return [task, *(f"- {name}" for name in shown)], rows


def records(pairs: Sequence[Pair], runs: Sequence[EvaluationRun]) -> list[dict[str, Any]]:
    """One flat entry a comparison, for JSON and CSV; scores and differences as fractions."""
    known = dict(zip(letters(len(runs)), runs, strict=True))
    return [
        {
            "task": pair.found.task,
            "a": known[pair.a].name,
            "b": known[pair.b].name,
            "template_a": known[pair.a].template,
            "template_b": known[pair.b].template,
            "mean_a": pair.found.mean_a,
            "mean_b": pair.found.mean_b,
            **asdict(pair.found.paired),
            "p_holm": pair.p_corrected,
            "marks": ", ".join(pair.found.marks),
        }
        for pair in pairs
    ]
