"""The controlled study: what does a state-space model buy in a VLM, and what does its connector?

    python -m harness.study --plan                   # cells, expected hours, what is finished
    python -m harness.study --workers 2              # do it, or go on with it
    python -m harness.study --scale quick --out runs/quick-study
    python -m harness.study --seeds 5 --families mamba,attention
    python -m harness.study --scale paper --data LLAVA --out STUDY    # commands for a lab
    python -m harness.study --records results/runs/study --page results/STUDY.md
    python -m harness.study --records runs/study/records runs/again/records --page BOTH.md

Language models of equal size (mamba, mamba2, attention, hybrid) learn from the same text, then with
each connector from the same pictures, each with its own learning rate; a cell is one of them with
one seed.  Each is asked the demo's benchmarks and `retrieval`, and watched for the update from
which on it uses its picture.  The same command continues an interrupted study.
What a finished cell leaves for good goes to --records, a small file each; what has one there is
not done again, though its folder is gone.  --page writes the page that these files give, and its
pictures beside it; a folder of the same study begun anew, with text pretrainings of its own, stands
beside the first: cells are compared within each, and the same cells between them.

--scale paper takes published language models and a folder with LLaVA's pretrain.json and
finetune.json; it writes OUT/commands.sh, or with --launcher slurm submits a job a cell.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.ablation.jobs import Job, run_jobs
from harness.controlled import hours, page, plan, records
from harness.controlled.design import SCALES
from harness.reporting import render
from vlmamba_core import launcher
from vlmamba_core.cli import Parser, cli
from vlmamba_core.errors import UserError
from vlmamba_core.folder import RunFolder
from vlmamba_core.names import choose

HEADERS = ("phase", "job", "state", "minutes left")


def build_parser() -> Parser:
    """The command line of `harness.study`."""
    parser = Parser(
        prog="python -m harness.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--scale", default="demo", help=f"{', '.join(SCALES)} (default: demo)")
    add("--plan", action="store_true", help="show cells, expected hours and what is finished; stop")
    add("--seeds", type=int, help="seeds 0 to N-1 of each cell (default: the scale's)")
    add("--families", help="some of the language models only, such as mamba,attention")
    add("--connectors", help="some of the connectors only, such as mlp,vss_l2")
    add("--data", type=Path, help="training data (default: drawn in OUT/pictures)")
    add("--train-args", default="", help='more flags of vlmamba.train, such as "--dtype fp32"')
    add("--workers", type=int, default=1, help="cells at a time; they share the cores (default: 1)")
    launcher.add_arguments(add)
    add("--out", type=Path, default=Path("runs/study"), help="default: runs/study")
    kept = "where finished cells leave what is kept (OUT/records); with --page several"
    add("--records", type=Path, nargs="+", metavar="FOLDER", help=kept)
    add("--page", type=Path, metavar="FILE.md", help="write the page of --records; stop")
    return parser


@cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    folders = args.records or [args.out / "records"]
    if args.page is not None:
        print(page.write(records.read(*folders), args.page))
        return 0
    if len(folders) > 1:
        raise UserError("a study writes to one folder of --records; only --page takes several")
    kept = folders[0]
    study = _study(args)
    where = launcher.Launcher.parse(args.launcher, args.slurm, args.out / "jobs")
    if args.plan or args.dry_run:
        print("\n\n".join([plan_text(study, args.workers, kept), *_lost_starts(study, kept)]))
        print("" if where.here else f"\n{where.script(study.scale.name)}", end="")
        return 0
    with RunFolder(args.out) as folder:
        if not study.scale.lessons and where.here:
            text, count = commands(study, kept)
            folder.write("commands.sh", text)
            if count:
                script = args.out / "commands.sh"
                print(f"{count} jobs are left: run {script}, then this command again")
                return 0
        run(study, args.workers, where, kept)
    page.write(records.read(kept), args.out / "STUDY.md")
    print(f"written to {args.out / 'STUDY.md'}, from {kept}")
    return 0


def run(study: plan.Study, workers: int, where: launcher.Launcher, kept: Path) -> None:
    """Do what is left, phase by phase; every job's record as soon as it is done."""
    for line in _lost_starts(study, kept):
        print(line, file=sys.stderr)
    rates: dict[str, float] = {}
    for phase in ("text", "rates"):
        _check(study, plan.phase_jobs(study, phase, rates), kept)
    for phase in plan.PHASES:
        jobs = plan.phase_jobs(study, phase, rates)
        places = {job.name: place for place, job in enumerate(jobs)}
        _check(study, jobs, kept)
        left = plan.left(study, phase, jobs, records.names(kept))
        if phase in ("rates", "cells") and left:
            _check_starts(study, kept)
            _check_data(study, kept)
        for job in run_jobs(left, workers, where):  # a cluster's finished ones come first
            _keep(study, phase, job, places[job.name], kept)
        if phase == "rates":
            rates = plan.chosen_rates(study, records.read(kept).rate_losses)


def _lost_starts(study: plan.Study, kept: Path) -> list[str]:
    """What to say of recorded cells whose text models are not in --out: at most one line."""
    recorded = {cell["family"] for cell in records.read(kept).cells.values()}
    starts = {f.name: plan.text_model(study, f.name) for f in study.chosen_families}
    lost = [n for n, model in starts.items() if n in recorded and model and not model.is_dir()]
    if not lost:
        return []
    return [
        f"Text models of recorded cells are not in {study.out}: {', '.join(lost)}. Trained again "
        "they may be others, and further cells are refused then; another --records begins anew"
    ]


def _check_starts(study: plan.Study, kept: Path) -> None:
    """Refuse records whose cells started from other text models than there are. Raises UserError.

    Trained again a text model is another one, unless to the bit: a lesson may be learnt in one run
    and not in the next, and what a connector buys would be told from both.
    """
    for family in study.chosen_families:
        model = plan.text_model(study, family.name)
        if model is None or not model.is_dir():
            continue
        mine = records.weights_digest(model)
        for name, cell in records.read(kept).cells.items():
            if cell["family"] == family.name and cell["started_from"] != mine:
                raise UserError(
                    f"{name} in {kept} started from another text model than {model} is; go on in "
                    "the --out where it was trained, or give another --records"
                )


def _check_data(study: plan.Study, kept: Path) -> None:
    """Refuse records whose cells learned from other data. Raises UserError."""
    from vlmamba.data.index import file_digest  # with torch, which --plan of a lab does not want

    now = {"pretrain": study.data / "pretrain.json", "finetune": study.out / "data/finetune.json"}
    digests = {name: [file_digest(file)] for name, file in now.items() if file.is_file()}
    for name, cell in records.read(kept).cells.items():
        before = cell.get("data", {})  # older records do not say
        for stage, mine in digests.items():
            if not cell["order"] and before.get(stage, mine) != mine:
                raise UserError(
                    f"{name} in {kept} learned from another {now[stage].name} than {now[stage]} "
                    "is; give the same --data, or another --records"
                )


def _check(study: plan.Study, jobs: Sequence[Job], kept: Path) -> None:
    """Refuse records of these jobs that were made with other settings. Raises UserError."""
    found = records.read(kept)
    for job in jobs:
        found.check(job.name, plan.fingerprint(study, job))


def _keep(study: plan.Study, phase: str, job: Job, place: int, kept: Path) -> None:
    """Write a finished job's record, and remove what only an unfinished one needs.

    place: of the job in its phase.
    """
    families = study.chosen_families
    if phase == "data":
        return
    if phase == "text":
        _check_starts(study, kept)  # the record of the model that cells started from stays
        found = records.text_record(job, families[place].name)
    elif phase == "rates":
        rates = study.scale.rates
        family, rate = families[place // len(rates)], rates[place % len(rates)]
        loss = plan.rate_loss(job)
        found = records.rate_record(job, family.name, rate, None if math.isinf(loss) else loss)
    else:
        cell = plan.cells(study)[place]
        found = records.cell_record(job, cell, plan.text_model(study, cell.family))
        if records.QUESTIONS not in records.names(kept):
            records.write(kept, records.QUESTIONS, records.question_record(job))
    records.write(kept, job.name, found | {"job": plan.fingerprint(study, job)})
    for checkpoints in job.folder.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)


def plan_text(study: plan.Study, workers: int, kept: Path) -> str:
    """Every job with its state and the minutes that are left, and the sum in hours."""
    per_token = hours.probe() if study.scale.prepares_data else None
    rows, left, core_hours, recorded = [], 0, 0.0, records.names(kept)
    for phase in plan.PHASES:
        expected = hours.expected(study, phase, per_token)
        to_do = plan.left(study, phase, [job for job, _ in expected], recorded)
        for job, seconds in expected:
            finished = job.finished or job not in to_do
            state = "finished" if finished else "begun" if job.folder.exists() else "to do"
            minutes = "-" if finished else "?" if seconds is None else f"{seconds / 60:.1f}"
            rows.append([phase, job.name, state, minutes])
            left += not finished
            core_hours += 0.0 if finished or seconds is None else seconds / 3600
    table = render.text_table(HEADERS, rows)
    total = f"{len(rows)} jobs, {left} left"
    if per_token is None:
        return f"{table}\n\n{total}; `vlmamba.train --estimate` tells what a cell takes"
    at = "job at a time" if workers == 1 else "jobs at a time"
    hours_ = f"about {core_hours / workers:.1f} hours with {workers} {at} ({core_hours:.1f} in all)"
    return f"{table}\n\n{total}: {hours_}, at {1 / per_token:.0f} tokens/s of training, as now"


def commands(study: plan.Study, kept: Path) -> tuple[str, int]:
    """A script with every command that can be run now and is not done, and how many jobs it has."""
    lines, count = ["#!/bin/bash", "set -e"], 0
    rates: dict[str, float] = {}
    for phase in plan.PHASES:
        jobs = plan.phase_jobs(study, phase, rates)
        left = plan.left(study, phase, jobs, records.names(kept))
        left = [job for job in left if not job.finished]
        for job in left:
            lines.append(f"\n# {job.name}")
            lines += [
                f"python -m {step.module} {shlex.join(step.arguments)}"
                for step in job.steps
                if not step.done.exists()
            ]
        count += len(left)
        if phase == "rates":
            if left:
                lines.append("\n# the cells follow when these rates have been tried")
                break
            rates = plan.chosen_rates(study, records.read(kept).rate_losses)
    return "\n".join(lines) + "\n", count


def _study(args: argparse.Namespace) -> plan.Study:
    """What the flags name. Raises UserError for unknown names and absent data."""
    scale = SCALES[choose("scale", args.scale, SCALES)]
    for name in ("seeds", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")
    families = _some("language model", args.families, [f.name for f in scale.families])
    connectors = _some("connector", args.connectors, scale.connectors)
    if not scale.prepares_data:
        for name in ("pretrain.json", "finetune.json"):
            if args.data is None or not (args.data / name).is_file():
                raise UserError(
                    f"--scale {scale.name} needs --data FOLDER with LLaVA's {name} and its pictures"
                )
    try:
        train = tuple(shlex.split(args.train_args))
    except ValueError as error:
        raise UserError(f"--train-args {args.train_args!r}: {error}") from error
    data = args.data or args.out / "pictures"
    return plan.Study(scale, args.out, data, args.seeds or scale.seeds, train, families, connectors)


def _some(kind: str, given: str | None, known: Sequence[str]) -> tuple[str, ...]:
    names = given.split(",") if given else ()
    return tuple(choose(kind, name.strip(), known) for name in names)


if __name__ == "__main__":
    sys.exit(main())
