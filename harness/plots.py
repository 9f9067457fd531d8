"""Plots of runs: scores with intervals, ablations, latency and memory against sequence length.

    python -m harness.plots --from results/runs --out results/plots     # as `make plots` does
    python -m harness.plots --from runs --out figures --style slides    # larger text and lines

All evaluations below --from give `scores`, every ablation NAME.scores, every profile NAME.latency,
NAME.decode and NAME.memory, each as SVG and as PNG of 300 dpi. Bars are intervals (of times: from
the fastest to the slowest run). The same records give the same bytes: no date, no random ids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import plots, score_plots
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
    parser.add_argument("--style", default="paper", help="paper or slides (default: paper)")
    return parser


def _of(found: store.Found, style: str) -> dict[str, bytes]:
    """The plots of one profile or ablation; none of an evaluation alone."""
    if found.kind == "profile":
        return plots.render(Profile.from_record(found.name, found.record), style)
    return score_plots.of_ablation(found.record, style) if found.kind == "ablation" else {}


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    plots.style(args.style)  # an unknown one is an error before any work
    found = store.find(args.source)
    runs = [store.EvaluationRun(f.name, f.path, f.record) for f in found if f.kind == "evaluation"]
    files = score_plots.of_runs(runs, args.style)
    for one in found:
        for name, content in _of(one, args.style).items():
            files[f"{one.name}.{name}"] = content
    print(plots.write_all(args.out, files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
