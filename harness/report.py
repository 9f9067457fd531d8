"""One self-contained HTML page about some runs: scores, the paper's tables, plots, every answer.

    python -m harness.report runs/demo --out report.html
    python -m harness.report runs/final runs/mlp results/runs/profile-cpu --out report.html
    python -m harness.report runs/demo --no-images --max-samples 500

A RUN is a folder with a record.json (of harness.run, harness.profile or harness.ablate), or one
that holds such folders. The page asks no server for anything: styles, script, plots and pictures
are inside. Large pictures that are too many for one file are in a folder beside it (report_pictures
for report.html). Everything that came from a model or from data is shown as text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.reporting import paper
from harness.reporting.browser import collect
from harness.reporting.page import Inputs, page
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically


def build_parser() -> Parser:
    """The command line of `harness.report`."""
    parser = Parser(
        prog="python -m harness.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    add("--out", type=Path, default=Path("report.html"), help="default: report.html")
    add("--title", default="VL-Mamba report", help="heading of the page")
    add("--no-images", action="store_true", help="leave the pictures out")
    add("--max-samples", type=int, default=5000, help="questions of a task (default: 5000)")
    add("--max-images", type=int, default=1000, help="pictures of the page (default: 1000)")
    add("--paper-tables", action="store_true", help="all of the paper's tables, whatever is run")
    add("--paper", type=Path, default=paper.FILE, help="default: results/paper.csv")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    if args.max_samples < 1 or args.max_images < 0:
        raise UserError("--max-samples must be at least 1 and --max-images at least 0")
    inputs = Inputs.read(args.runs)
    if not args.out.resolve().parent.is_dir():
        raise UserError(f"no folder {str(args.out.parent)!r} for --out")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; give a file")
    images = 0 if args.no_images else args.max_images
    folder = args.out.with_name(f"{args.out.stem}_pictures")
    browser = collect(inputs.evaluations, args.max_samples, images, folder)
    text = page(inputs, browser, args.title, args.paper, args.paper_tables)
    write_atomically(args.out, text)
    for note in browser.notes:
        print(f"note: {note}", file=sys.stderr)
    pictures = f"{len(browser.images)} pictures, {args.out.stat().st_size / 2**20:.1f} MiB"
    beside = f"; large pictures in {browser.folder}" if browser.folder else ""
    number = len(inputs.records())
    print(f"written to {args.out}: {number} run{'s' * (number != 1)}, {pictures}{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
