"""Ablate one axis: train every variant with every seed, evaluate it, and put them in one table.

    python -m harness.ablate --axis connector --quick --seeds 1
    python -m harness.ablate --axis connector --seeds 3 --jobs 2
    python -m harness.ablate --axis scan --steps 600 --tasks pope,mme,gqa --limit 400
    python -m harness.ablate --axis scan --variants bsm,csm --seeds 1 --out runs/quick
    python -m harness.ablate --axis connector --scale paper --data LLAVA --eval-data hub --seeds 1

At the demo's scale: the nano model on generated pictures. All start from the language model of the
demo's own text stages (`make demo-model` leaves them under --lm); stages `pretrain` and `finetune`
follow for each cell, then harness.run. `--lm nano` takes the bundled model's language model, which
has learnt with connector vss_l2 and scan bsm; `--quick` takes it too, with training pictures of its
own and a small budget: a few minutes a cell, from nothing. At the paper's: its presets, published
parts, and a folder with pretrain.json, finetune.json and their images. Finished cells are kept,
also between axes, and the same command continues an interrupted study. OUT/AXIS receives
record.json and table.md.  `--launcher slurm --slurm partition=NAME,gpus_per_node=1` makes each cell
a job of a cluster whose machines share these folders; `--dry-run` shows the script.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tasks
from harness.ablation.cells import Budget, Cell, job
from harness.ablation.jobs import execute, run_jobs
from harness.ablation.record import record_of
from harness.ablation.variants import AXES, FINAL, SCALES, Variant, variants
from harness.data.sources import Source, choose_tasks
from harness.models import BUNDLED_MODELS
from harness.reporting import ablation_tables, render
from harness.runs import schema
from vlmamba_core import launcher
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import RunFolder, explain
from vlmamba_core.names import choose

FILES = {
    **dict.fromkeys(AXES, "the study of this axis: record.json, table.md"),
    "cells": "VARIANT/seed-N: trainings and evaluation of each cell. A finished one is not made "
    "again, so the folder is needed as long as the study may grow; cells/features may be deleted",
    "jobs": "with --launcher slurm: the cluster's logs",
}
NOTE = "Without AXIS/record.json a study is not finished: the same command goes on with it."


def build_parser() -> Parser:
    """The command line of `harness.ablate`."""
    parser = Parser(
        prog="python -m harness.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--axis", required=True, help=", ".join(AXES))
    add("--scale", default="demo", help=f"{' or '.join(SCALES)} (default: demo)")
    add("--variants", help="some of the axis's variants only (default: all)")
    add("--seeds", type=int, default=3, help="seeds 0 to N-1 of each variant (default: 3)")
    add("--tasks", default="all", help=f"all, or some of {', '.join(tasks.NAMES)}")
    add("--data", type=Path, help="training data of the demo world (default: runs/demo-data)")
    add(
        "--lm",
        type=Path,
        help="holds text/final, talk/final (default: runs/demo-model), or nano, the bundled model",
    )
    add("--quick", action="store_true", help="from the bundled model, a few minutes a cell")
    add("--pretrain-steps", type=int, help="updates of stage 1 (default: the recipe's)")
    add("--steps", type=int, help="updates of stage 2 (default: the recipe's)")
    add("--train-args", help='more flags of vlmamba.train, such as "--dtype fp32"')
    add("--eval-data", default="demo", help="what harness.run takes as --data (default: demo)")
    add("--style", help="demo data only: seen, heldout or validation")
    add("--limit", type=int, help="only the first N questions of each task")
    add("--jobs", type=int, default=1, help="cells at a time; they share the cores (default: 1)")
    launcher.add_arguments(add)
    add("--out", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = _with_defaults(build_parser().parse_args(argv))
    budget = _budget(args)
    chosen = _chosen(args)
    cells = [Cell(variant, seed) for seed in range(args.seeds) for variant in chosen]
    where = launcher.Launcher.parse(args.launcher, args.slurm, args.out / "jobs")
    _check_inputs(args, cells)
    if args.dry_run:
        print(_plan(cells, where, args.jobs))
        return 0
    with RunFolder(args.out) as folder:
        explain(args.out, "harness.ablate", FILES, NOTE)
        if args.quick and not (args.data / "finetune.json").exists():
            _make_data(args.data)
        for _ in run_jobs([job(c, budget, args.out / "cells") for c in cells], args.jobs, where):
            pass  # the record speaks of all of them
        record = record_of(args.axis, cells, budget, args.out / "cells")
        (args.out / args.axis).mkdir(exist_ok=True)
        shown = ablation_tables.tables_of(record)
        folder.write(f"{args.axis}/record.json", schema.record_text(record))
        text = "\n".join(table.files()["md"] for table in shown)
        folder.write(f"{args.axis}/table.md", text)
    for table in shown:
        print(f"{table.title}\n{table.note}\n\n{render.text_table(table.headers, table.rows)}\n")
    print(f"written to {args.out / args.axis}: record.json, table.md")
    return 0


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was left out: with --quick a small budget, else the recipes' own."""
    if args.quick and args.scale != "demo":
        raise UserError("--quick is for --scale demo: it starts from the bundled model")
    quick: dict[str, Any] = {
        "lm": Path("nano"),
        "data": args.out / "data",
        "pretrain_steps": 120,
        "steps": 400,
        "train_args": "--batch-size 8 --micro-batch 8",
        "limit": 150,
    }
    usual = {"lm": Path("runs/demo-model"), "data": Path("runs/demo-data"), "train_args": ""}
    for name, value in (quick if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _make_data(folder: Path) -> None:
    """Draw the training pictures of --quick, as many as its updates see."""
    print(f"drawing training pictures in {folder}", file=sys.stderr, flush=True)
    pictures = ["--images", "3200", "--captions", "1000", "--dialogues", "16"]
    if code := execute("vlmamba.demo", ["--out", str(folder), *pictures]):
        raise UserError(f"the training pictures were not made: vlmamba.demo ended with {code}")


def _plan(cells: Sequence[Cell], where: launcher.Launcher, jobs: int) -> str:
    """What --dry-run shows: every cell, and how it would be started."""
    names = "\n".join(cell.name for cell in cells)
    if where.here:
        return f"{len(cells)} cells, {jobs} at a time, on this machine:\n{names}"
    return f"{len(cells)} cells, a job each:\n{names}\n\n{where.script(cells[0].name)}"


def _budget(args: argparse.Namespace) -> Budget:
    """What every cell gets. Raises UserError for numbers that make no sense."""
    try:
        train_args = tuple(shlex.split(args.train_args))
    except ValueError as error:
        raise UserError(f"--train-args {args.train_args!r}: {error}") from error
    for name in ("seeds", "pretrain_steps", "steps", "limit", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    return Budget(
        data=str(args.data),
        lm=str(args.lm),
        pretrain_steps=args.pretrain_steps,
        finetune_steps=args.steps,
        train_args=train_args,
        tasks=args.tasks,
        eval_data=args.eval_data,
        scale=args.scale,
        style=args.style,
        limit=args.limit,
    )


def _chosen(args: argparse.Namespace) -> list[Variant]:
    """The axis's variants, the final model always among them: it is what all are tested against."""
    args.axis = choose("axis", args.axis, AXES)
    args.scale = choose("scale", args.scale, SCALES)
    known = {variant.name: variant for variant in variants(args.axis, args.scale)}
    names = [x.strip() for x in args.variants.split(",")] if args.variants else list(known)
    names = [choose(f"variant of axis {args.axis}", name, known) for name in names]
    final = FINAL[args.scale]
    return [v for name, v in known.items() if name in names or v.same_model(final)]


def _check_inputs(args: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Raise UserError for unknown tasks, absent training data or language models.

    Before anything is trained.
    """
    source = Source.parse(args.eval_data, args.style)
    choose_tasks(args.tasks, source)
    wanted = [args.data / name for name in ("pretrain.json", "finetune.json")]
    if args.quick and args.data == args.out / "data":
        wanted = []
    bundled = str(args.lm) in BUNDLED_MODELS
    if bundled and args.axis == "llm":
        raise UserError("axis llm compares the demo's text stages: give --lm with both of them")
    if not bundled:
        wanted += [args.lm / cell.variant.lm / "final" for cell in cells if cell.variant.lm]
    for path in wanted:
        if not path.exists():
            made = "`make demo-model` makes it (or give --data and --lm folders)"
            if args.scale == "paper":
                made = "--data is a folder with LLaVA's pretrain.json, finetune.json and pictures"
            raise UserError(f"{path} is missing: {made}")


if __name__ == "__main__":
    sys.exit(main())
