"""Generate the demo world: training data, benchmark files, or both.

    python -m vlmamba.demo --out demo_data --images 12000 --captions 8000 --seed 0
    python -m vlmamba.demo --out demo_bench --benchmarks pope,mme --split heldout
    python -m vlmamba.demo --out demo_bench --benchmarks all --split validation --styles fluent

Training data goes to `--out` itself (text.txt, near.txt, far.txt, dialogue.json, pretrain.json,
finetune.json, images/), benchmark files to `--out`/TASK.parquet.  Without --benchmarks training
data is made; with it, benchmark files are (and training data too where --images, --captions or
--labeled is given, of these alone).  Equal arguments, equal files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from vlmamba.demo.benchmarks import BENCHMARKS, benchmark_split, build_benchmark
from vlmamba.demo.conversations import build_training_data
from vlmamba.demo.world import SPLITS, STYLES
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vlmamba.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--images", type=int, help="conversation pictures (default 12000)")
    parser.add_argument("--captions", type=int, help="caption pictures (default 8000)")
    parser.add_argument("--dialogues", type=int, default=20000, help="scenes told in words")
    parser.add_argument(
        "--labeled", type=int, default=0, help="conversations on what retrieval asks (default 0)"
    )
    parser.add_argument(
        "--patch-words", action="store_true", help="say what each patch of a picture shows"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="drawing processes (default 2)")
    parser.add_argument(
        "--styles",
        type=_names("style", STYLES),
        help=f"emoji styles to draw with, of {','.join(STYLES)} (default: those of the split)",
    )
    parser.add_argument(
        "--benchmarks",
        type=_names("benchmark", BENCHMARKS),
        help=f"all, or some of {','.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--split", default="seen", help=f"of benchmarks: {', '.join(list(SPLITS)[1:])}"
    )
    parser.add_argument("--no-easy-vqa", action="store_true", help="leave easy-VQA out of training")
    return parser


def _names(kind: str, known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """An argparse type: comma-separated names out of `known`; "all" stands for all of them."""

    def parse(text: str) -> tuple[str, ...]:
        names = list(known)
        if text.casefold() == "all":
            return tuple(names)
        try:
            return tuple(choose(kind, name, names) for name in text.split(","))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


@cli
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if (
        min(args.images or 0, args.captions or 0, args.dialogues, args.labeled) < 0
        or args.workers < 1
    ):
        raise UserError("numbers of samples must not be negative, --workers at least 1")
    split = benchmark_split(args.split)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error.strerror}") from error
    if args.benchmarks is None or args.images or args.captions or args.labeled:
        asked = any(a is not None for a in (args.images, args.captions, args.benchmarks))
        build_training_data(
            args.out,
            images=args.images or (0 if asked else 12000),
            captions=args.captions or (0 if asked else 8000),
            dialogues=args.dialogues,
            seed=args.seed,
            easy_vqa=not args.no_easy_vqa,
            workers=args.workers,
            labeled=args.labeled,
            patches=args.patch_words,
            **({"styles": args.styles} if args.styles else {}),
        )
    for task in args.benchmarks or ():
        folder = build_benchmark(task, args.out, split, args.seed, styles=args.styles)
        print(folder / f"{task}.parquet")


if __name__ == "__main__":
    raise SystemExit(main())
