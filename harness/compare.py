"""Compare runs question by question: paired differences, 95 % intervals, p-values.

    python -m harness.compare runs/final runs/mlp
    python -m harness.compare runs/final runs/mlp --markdown
    python -m harness.compare runs/a runs/b runs/c --csv pairs.csv --json pairs.json

Takes folders that `harness.run` wrote. Only questions that both of two runs answered count; the
score of a question is the benchmark's own (right or wrong, VQA's share of agreeing annotators,
...), so the difference is in the mean score of a question, not in totals such as MME's. See
harness/scoring/paired.py for the statistics.

Two runs: the p-values are of single tests; with several tasks, some are small by chance. More runs:
a matrix for every task, the p-values corrected by Holm's method over all pairs and tasks shown. The
files hold every comparison with its interval, single p-value and corrected one (p_holm).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import render
from harness.reporting.compare import (
    HEADERS,
    Pair,
    compare,
    compare_all,
    letters,
    matrix,
    records,
    rows,
)
from harness.runs.store import EvaluationRun, distinct_names
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; expected 0 or more")
    if len(args.runs) < 2:
        raise UserError("one run is no comparison; give the folders of two or more")
    names = distinct_names(args.runs)
    runs = [EvaluationRun.read(*pair) for pair in zip(args.runs, names, strict=True)]
    show = render.markdown_table if args.markdown else render.text_table
    legend = [f"{name}: {run.title}" for name, run in zip(letters(len(runs)), runs, strict=True)]
    pairs = compare_all(runs, seed=args.seed) if len(runs) > 2 or args.json or args.csv else []
    if len(runs) == 2:
        text = show(HEADERS, rows(compare(*runs, seed=args.seed)))
    else:
        names_of_tasks = dict.fromkeys(pair.found.task for pair in pairs)
        tables = [show(*matrix(pairs, task, runs)) for task in names_of_tasks]
        text = "\n\n".join([*tables, note(pairs)])
    write(args, pairs, runs)
    print("\n".join(legend), text, sep="\n\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line of `harness.compare`."""
    parser = Parser(
        prog="python -m harness.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="runs' folders, on the same questions")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--seed", type=int, default=0, help="of random sign flips (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write every comparison to a JSON file")
    add("--csv", type=Path, metavar="FILE", help="the same as a table")
    return parser


def note(pairs: Sequence[Pair]) -> str:
    """What a reader of the matrices must know."""
    count = len(pairs)
    return (
        "A row's run minus a column's, in points of the mean score of a question; sign-flip test, "
        f"p corrected by Holm's method over {count} comparison{'s' * (count != 1)}."
    )


def write(args: argparse.Namespace, pairs: Sequence[Pair], runs: Sequence[EvaluationRun]) -> None:
    """Write the files that were asked for. Raises UserError where one cannot be written."""
    found = records(pairs, runs)
    table = io.StringIO()
    if found:
        lines = csv.DictWriter(table, list(found[0]), lineterminator="\n")
        lines.writeheader()
        lines.writerows(found)
    texts = {args.json: json.dumps(found, indent=1) + "\n", args.csv: table.getvalue()}
    for path, text in texts.items():
        try:
            if path is not None:
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
