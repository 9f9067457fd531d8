"""Compare two runs question by question: paired difference, 95 % interval, p-value.

    python -m harness.compare runs/final runs/mlp
    python -m harness.compare runs/final runs/mlp --markdown

Takes folders that `harness.run` wrote. Only questions that both answered count; the score of a
question is the benchmark's own (right or wrong, VQA's share of agreeing annotators, ...), so the
difference is in the mean score of a question, not in totals such as MME's. See
harness/scoring/paired.py for the statistics. The p-values are of single tests: with several tasks,
some are small by chance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import render
from harness.reporting.compare import HEADERS, compare, rows
from harness.runs.store import EvaluationRun, distinct_names
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError


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
    show = render.markdown_table if args.markdown else render.text_table
    print(f"A: {a.title}\nB: {b.title}\n")
    print(show(HEADERS, rows(compare(a, b, seed=args.seed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
