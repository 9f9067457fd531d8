"""Tables of results: text for the terminal; Markdown, CSV and LaTeX for files; from the same rows.

    python -m harness.tables --from results/runs --out results/tables     # as `make tables` does

A benchmark gives one row per metric; scores of its parts ("category/metric" keys) follow in a
table of their own, one row per part. A profile gives its points, growth and crossovers. The paper's
tables stand beside all evaluations found. LaTeX wants the package booktabs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import paper, publish
from harness.reporting.plots import write_all
from harness.runs import store
from vlmamba_core.cli import Parser, cli


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(
        prog="python -m harness.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--paper", type=Path, default=paper.FILE, help="default: results/paper.csv")
    args = parser.parse_args(argv)
    files = {
        f"{name}.{suffix}": content
        for name, table in publish.all_tables(store.find(args.source), args.paper).items()
        for suffix, content in table.files().items()
    }
    print(write_all(args.out, files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
