"""Compare two runs question by question: paired difference, 95 % interval, p-value.

    python -m harness.compare runs/final runs/mlp
    python -m harness.compare runs/final runs/mlp --markdown

Takes folders that `harness.run` wrote. Only questions that both answered count; the score of a
question is the benchmark's own (right or wrong, VQA's share of agreeing annotators, ...), so the
difference is in the mean score of a question, not in totals such as MME's. See harness/paired.py
for the statistics. The p-values are of single tests: several tasks are several looks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import tables
from harness.cli import Parser, cli
from harness.paired import Paired, paired
from harness.records import Sample, with_marks
from harness.runs import NAMED, NO_IMAGE, EvaluationRun, distinct_names
from harness.runs import marks as marks_of
from harness.stats import too_few
from tasks.errors import UserError

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
    ours = {sample.doc_id: sample for sample in a.samples(task)}
    rows = []
    for other in b.samples(task):
        mine = ours.get(other.doc_id)
        if mine is None:
            continue
        if not same_question(mine, other):
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


def same_question(mine: Sample, other: Sample) -> bool:
    """Whether two samples of one row have one truth and one picture.

    Answers that came in a file know a picture by its name, or not at all: beside those of a run,
    which know its content, the question's text has to be the same instead.
    """
    if mine.truth != other.truth:
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
            interval_text(c.paired),
            p_text(c.paired.p_value),
            str(c.paired.n),
            str(c.paired.clusters),
            f"{c.paired.better}/{c.paired.worse}",
        ]
        for c in found
    ]


def interval_text(found: Paired) -> str:
    """ "low to high" in per cent, or that there are too few clusters."""
    if found.low is None or found.high is None:
        return too_few(found.clusters).reason
    return f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"


def p_text(p: float) -> str:
    """Two digits; very small ones as a bound."""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(
        prog="python -m harness.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, help="a run's folder")
    parser.add_argument("b", type=Path, help="another one's, on the same questions")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--seed", type=int, default=0, help="of random sign flips (default: 0)")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; expected 0 or more")
    names = distinct_names([args.a, args.b])
    a, b = EvaluationRun.read(args.a, names[0]), EvaluationRun.read(args.b, names[1])
    render = tables.markdown_table if args.markdown else tables.text_table
    print(f"A: {a.title}\nB: {b.title}\n")
    print(render(HEADERS, rows(compare(a, b, seed=args.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
