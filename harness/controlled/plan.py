"""The jobs of the controlled study, phase by phase: what is trained, from what, and asked what.

`phases` gives data, text, rates and cells; the cells' learning rates are those that the rates'
jobs have chosen, so the phases follow each other.  Within the cells connectors come one after the
other with all their seeds, the orders of the prompt last: what is finished early is a whole
comparison.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.ablation.jobs import Job, Step, key_of
from harness.controlled.design import SIGNS, Family, Order, Scale, Stage
from vlmamba_core.errors import UserError

PHASES = ("data", "text", "rates", "cells")
USUAL = Order("", "")


@dataclass(frozen=True)
class Study:
    """A scale in a folder.

    data: training data (drawn there where the scale draws its own); train: further flags of every
    vlmamba.train; families, connectors: some of the scale's.
    """

    scale: Scale
    out: Path
    data: Path
    seeds: int
    train: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    connectors: tuple[str, ...] = ()

    @property
    def chosen_families(self) -> list[Family]:
        """In the scale's order."""
        return [f for f in self.scale.families if not self.families or f.name in self.families]

    @property
    def chosen_connectors(self) -> list[str]:
        """In the scale's order."""
        return [c for c in self.scale.connectors if not self.connectors or c in self.connectors]


@dataclass(frozen=True)
class Cell:
    """A model that is trained and asked everything; order: of its prompts, if not the usual one."""

    family: str
    connector: str
    seed: int
    order: str = ""

    @property
    def name(self) -> str:
        """Of its folder and record."""
        return "+".join(filter(None, (self.family, self.connector, self.order, f"s{self.seed}")))

    @property
    def model(self) -> str:
        """Without its seed."""
        return "+".join(filter(None, (self.family, self.connector, self.order)))


def cells(study: Study) -> list[Cell]:
    """All cells, in the order in which they are trained."""
    families = [family.name for family in study.chosen_families]
    connectors = study.chosen_connectors
    found = [
        Cell(family, connector, seed)
        for connector in connectors
        for seed in range(study.seeds)
        for family in families
    ]
    asked = [name for name in families if name in study.scale.order_families]
    orders = [order.name for order in study.scale.orders]
    return found + [Cell(name, connectors[0], 0, order) for order in orders for name in asked]


def phase_jobs(study: Study, phase: str, rates: Mapping[str, float]) -> list[Job]:
    """The jobs of one phase; rates: family -> learning rate, for the cells."""
    if phase == "data":
        return [data_job(study)]
    families = study.chosen_families
    if phase == "text":
        return [text_job(study, f) for f in families] if study.scale.lessons else []
    if phase == "rates":
        return [rate_job(study, f, rate) for f in families for rate in study.scale.rates]
    return [cell_job(study, cell, rates[cell.family]) for cell in cells(study)]


def left(study: Study, phase: str, jobs: Sequence[Job], recorded: Container[str]) -> list[Job]:
    """Those of a phase's jobs that are to do, given the names of those that are on record.

    Data and a family's text are needed where anything behind them is left, record or not.
    """
    if phase in ("rates", "cells"):
        return [job for job in jobs if job.name not in recorded]
    behind = {
        family.name: [rate_name(family, rate) for rate in study.scale.rates]
        for family in study.chosen_families
    }
    for cell in cells(study):
        behind[cell.family].append(cell.name)
    waiting = {
        f"text+{name}" for name, jobs in behind.items() if not all(j in recorded for j in jobs)
    }
    return [job for job in jobs if (waiting if phase == "data" else job.name in waiting)]


def data_job(study: Study) -> Job:
    """Draws the training data where the scale does, and puts held-out samples aside."""
    folder, steps = study.out / "data", []
    if study.scale.prepares_data:
        drawn = ("--out", str(study.data), "--workers", "1", *study.scale.data)
        steps.append(Step("vlmamba.demo", drawn, study.data / "finetune.json", again=False))
    aside = ["--data", str(study.data), "--out", str(folder)]
    aside += ["--held-out", str(study.scale.held_out)]
    steps.append(Step("harness.controlled.data", tuple(aside), folder / "finetune.json"))
    return _job("data", folder, steps)


def text_job(study: Study, family: Family) -> Job:
    """The lessons without pictures, one after the other: what a family's cells start from."""
    folder, steps, before = study.out / "text" / family.name, [], None
    lessons = study.scale.lessons
    for lesson in lessons:
        flags = ["--stage", lesson.kind, "--data", *(str(study.data / f) for f in lesson.files)]
        if before is None:  # the tokenizer learns from the first words and from the last ones
            both = (*lesson.files, *lessons[-1].files)
            flags += ["--tokenizer-data", *(str(study.data / file) for file in both)]
        else:
            flags += ["--init", str(before)]
        part = _Part(family)
        steps.append(
            _training(study, part, folder / lesson.name, [*flags, *lesson.arguments(family)])
        )
        before = steps[-1].done
    return _job(f"text+{family.name}", folder, steps)


def text_model(study: Study, family: str) -> Path | None:
    """The language model that a family's cells start from; None: a published one."""
    if not study.scale.lessons:
        return None
    return study.out / "text" / family / study.scale.lessons[-1].name / "final"


def fingerprint(study: Study, job: Job) -> str:
    """Of what a job does, in whichever folder."""
    places = ((str(study.data), "DATA"), (str(study.out), "OUT"))

    def plain(argument: str) -> str:
        for folder, name in places:
            if argument == folder or argument.startswith(f"{folder}/"):
                return name + argument.removeprefix(folder)
        return argument

    said = json.dumps([[step.module, *map(plain, step.arguments)] for step in job.steps])
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rate_name(family: Family, rate: float) -> str:
    """Of its job and record."""
    return f"rate+{family.name}+{rate:g}"


def rate_job(study: Study, family: Family, rate: float) -> Job:
    """Short runs of both stages with the first connector; the second one's held-out loss counts."""
    scale = study.scale
    folder = study.out / "rates" / f"{family.name}+{rate:g}"
    part = _Part(family, scale.connectors[0])
    look = scale.rate_finetune.steps or scale.look_every
    steps = [
        _aligning(study, part, folder, scale.rate_pretrain),
        _tuning(study, part, folder, scale.rate_finetune, rate, look),
    ]
    lost = folder / "loss.json"
    wanted = ("--out", str(lost), "--", *steps[1].arguments)
    steps[1] = Step("harness.controlled.rate", wanted, lost)
    return _job(rate_name(family, rate), folder, steps)


def chosen_rates(study: Study, known: Mapping[str, float]) -> dict[str, float]:
    """Of each family the rate with the lowest held-out loss. Raises UserError without one.

    known: losses of jobs that are on record, by name.
    """
    chosen = {}
    for family in study.chosen_families:
        jobs = {rate: rate_job(study, family, rate) for rate in study.scale.rates}
        losses = {
            rate: known[job.name] if job.name in known else rate_loss(job)
            for rate, job in jobs.items()
        }
        best = min(losses, key=lambda rate: losses[rate])
        if losses[best] == math.inf:
            raise UserError(f"{family.name}: training diverged with every rate; lower them")
        chosen[family.name] = best
    return chosen


def rate_loss(job: Job) -> float:
    """Held-out loss at the end of a rate's job; infinite where training diverged."""
    loss = json.loads((job.folder / "loss.json").read_text(encoding="utf-8"))["loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def cell_job(study: Study, cell: Cell, rate: float) -> Job:
    """Both stages, all questions, the text-only control of retrieval, and the costs."""
    scale = study.scale
    family = next(family for family in scale.families if family.name == cell.family)
    order = next((order for order in scale.orders if order.name == cell.order), USUAL)
    folder = study.out / "cells" / cell.name
    part = _Part(family, cell.connector, cell.seed, order)
    steps = [
        _aligning(study, part, folder, scale.pretrain),
        _tuning(study, part, folder, scale.finetune, rate, scale.look_every),
    ]
    model = ("--model", str(folder / "finetune" / "final"))
    asked: dict[str, tuple[str, str, int | None, tuple[str, ...]]] = {
        "evaluation": (scale.tasks, scale.eval_data, scale.limit, order.ask),
        SIGNS: (SIGNS, "demo", scale.retrieval, ()),
        "blind": (SIGNS, "demo", scale.blind, ("--blind",)),
    }
    for name, (tasks, data, limit, more) in asked.items():
        flags = ("--tasks", tasks, *model, "--data", data, "--out", str(folder / name), *more)
        flags += ("--limit", str(limit)) if limit else ()
        steps.append(Step("harness.run", flags, folder / name / "record.json"))
    lengths = ",".join(map(str, scale.state_lengths))
    wanted = (*model, "--out", str(folder / "cost.json"), "--lengths", lengths)
    steps.append(Step("harness.controlled.cost", wanted, folder / "cost.json"))
    return _job(cell.name, folder, steps)


@dataclass(frozen=True)
class _Part:
    """The model of a training step, and the order of its prompts."""

    family: Family
    connector: str = ""
    seed: int = 0
    order: Order = USUAL


def _aligning(study: Study, part: _Part, folder: Path, stage: Stage) -> Step:
    """Stage 1: the connector learns."""
    flags = ["--stage", "pretrain", "--data", str(study.data / "pretrain.json")]
    if start := text_model(study, part.family.name):
        flags += ["--init", str(start)]
    return _training(study, part, folder / "pretrain", [*flags, *stage.arguments()])


def _tuning(study: Study, part: _Part, folder: Path, stage: Stage, rate: float, look: int) -> Step:
    """Stage 2 at the rate, with a look at the held-out samples every `look` updates."""
    variant = f"finetune-{part.order.data}.json" if part.order.data else "finetune.json"
    flags = ["--stage", "finetune", "--data", str(study.out / "data" / variant)]
    flags += ["--init", str(folder / "pretrain" / "final"), "--lr", f"{rate:g}"]
    flags += ["--eval-data", str(study.out / "data" / "held_out.json")]
    flags += ["--eval-every", str(look), "--eval-other-pictures"]
    return _training(study, part, folder / "finetune", [*flags, *stage.arguments()])


def _training(study: Study, part: _Part, out: Path, flags: Sequence[str]) -> Step:
    arguments = [*part.family.arguments(part.connector, study.scale.encoder), *flags]
    if part.connector:
        arguments += ["--images", str(study.data), *part.order.train]
        if (
            study.scale.prepares_data
        ):  # a few thousand pictures; a real set's features are terabytes
            arguments += ["--features-cache", str(study.out / "features")]
    if study.scale.prepares_data:
        arguments += ["--save-every", "200", "--keep", "1"]
    arguments += ["--out", str(out), "--seed", str(part.seed), "--resume", "auto"]
    return Step("vlmamba.train", (*arguments, *study.train), out / "final")


def _job(name: str, folder: Path, steps: Sequence[Step]) -> Job:
    """What its steps are told is what a job that goes on must have in common."""
    settings = {key_of(step, folder): step.arguments for step in steps}
    return Job(name, folder, settings, tuple(steps))
