"""The loss of a run as a picture, from its train.jsonl alone.

    python -m vlmamba.training.plot OUT                 # writes OUT/loss.png
    python -m vlmamba.training.plot RUN OTHER --to both.png

Every step's loss is drawn pale, a running mean over it, and the held-out loss (`eval_loss`) as
points where it was measured.  Training draws it when it ends; while it runs, this command does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError

MEMORY = 0.95  # of the running mean: a step's weight after n steps is 0.95^n


def read_losses(log: Path) -> tuple[np.ndarray, np.ndarray]:
    """train.jsonl -> (step, loss) (n, 2) and (step, eval_loss) (m, 2) of the steps that have one.

    A last line that is still being written is left out.  Raises UserError for another file.
    """
    losses: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    try:
        for line in log.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                entry = json.loads(line)
                for name, found in (("loss", losses), ("eval_loss", held_out)):
                    if entry.get(name) is not None:
                        found.append((int(entry["step"]), float(entry[name])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{log} is not the log of a training run: {error!r}") from error
    return np.array(losses).reshape(-1, 2), np.array(held_out).reshape(-1, 2)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Exponential mean of each value and those before it, without a bias to the first."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = MEMORY * mean + value, MEMORY * weight + 1
        means.append(mean / weight)
    return np.array(means)


def draw(runs: Sequence[Path], to: Path) -> Path:
    """Write the losses of the runs' folders as a picture (the suffix chooses its kind)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, out in enumerate(runs):
        losses, held_out = read_losses(out / "train.jsonl")
        color, name = f"C{number}", f"{out.resolve().name}: " if len(runs) > 1 else ""
        if len(losses):
            axes.plot(*losses.T, color=color, alpha=0.3, linewidth=0.8)
            mean = running_mean(losses[:, 1])
            axes.plot(losses[:, 0], mean, color=color, label=f"{name}training, running mean")
        if len(held_out):
            axes.plot(*held_out.T, "o--", color=color, mec="black", label=f"{name}held out")
    axes.set(xlabel="step", ylabel="loss per label (nats)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(to, dpi=150, metadata={"Software": None} if to.suffix == ".png" else None)
    return to


@cli
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs that are named."""
    p = Parser(
        prog="python -m vlmamba.training.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="output folders of runs")
    p.add_argument("--to", type=Path, help="picture to write: .png, .svg or .pdf (OUT/loss.png)")
    args = p.parse_args(argv)
    to = args.to or args.runs[0] / "loss.png"
    if to.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--to {to}: expected a .png, .svg or .pdf file")
    print(draw(args.runs, to))


if __name__ == "__main__":
    raise SystemExit(main())
