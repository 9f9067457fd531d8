"""One learning rate tried: vlmamba.train to its end, then the held-out loss that it came to.

    python -m harness.controlled.rate --out loss.json -- --preset nano+mlp --stage finetune ...

loss.json says {"loss": 1.93}, or null where training diverged: that is an answer, no failure.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.ablation import jobs
from vlmamba_core.cli import Parser, cli
from vlmamba_core.folder import write_atomically

DIVERGED = "training diverged"  # in vlmamba.train's message


def held_out_loss(log: Path) -> float:
    """The last one in a train.jsonl."""
    entries = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [entry["eval_loss"] for entry in entries if "eval_loss" in entry][-1]


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="python -m harness.controlled.rate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("training", nargs="+", help="behind --: the flags of vlmamba.train")
    args = parser.parse_args(argv)
    printed = args.out.with_name("train.txt")
    code = jobs.execute("vlmamba.train", args.training, printed)
    folder = Path(args.training[args.training.index("--out") + 1])
    if code and DIVERGED not in printed.read_text(encoding="utf-8"):
        print(f"vlmamba.train ended with code {code}, see {printed}", file=sys.stderr)
        return code
    loss = None if code else held_out_loss(folder / "train.jsonl")
    if loss is not None and not math.isfinite(loss):  # the last update broke the weights
        loss = None
    write_atomically(args.out, json.dumps({"loss": loss}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
