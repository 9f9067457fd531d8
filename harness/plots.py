"""Plots of profiles: latency and memory against sequence length, log-log, crossovers marked.

    python -m harness.plots --from results/runs --out results/plots     # as `make plots` does

Every profile below --from gives NAME.latency, NAME.decode and NAME.memory, each as SVG and PNG. The
same records give the same bytes: no date, no random ids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import plots
from harness.runs import store
from harness.speed.sweep.summary import Profile
from vlmamba_core.cli import Parser, cli


def build_parser() -> Parser:
    """The command line of `harness.plots`."""
    parser = Parser(
        prog="python -m harness.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the plots")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    files = {
        f"{found.name}.{name}": content
        for found in store.find(args.source)
        if found.kind == "profile"
        for name, content in plots.render(Profile.from_record(found.name, found.record)).items()
    }
    print(plots.write_all(args.out, files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
