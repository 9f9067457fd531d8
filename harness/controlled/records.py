"""What a finished job leaves for good: a small compressed file, from which every figure is made.

    write(folder, "mamba+mlp+s0", cell_record(study, cell))      # FOLDER/mamba+mlp+s0.json.gz
    kept = read(folder)                                          # Records: cells, texts, rates
    kept = read(folder, other)                 # a study, and the same one begun anew elsewhere

A cell's file holds its curves, the score of every question, costs and settings; questions.json.gz
says once what the questions of all cells are: picture, and of retrieval kind, k and distance.
A folder holds the cells of one text pretraining of each family; read with others, each record
says by its place which one (`start`, from 1).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import tasks
from harness.ablation.jobs import Job
from harness.controlled import plan
from harness.controlled.design import SIGNS
from harness.data.questions import NO_IMAGE
from harness.data.sources import Source
from harness.runs.schema import Sample
from harness.runs.store import EvaluationRun
from vlmamba_core.errors import UserError

SUFFIX = ".json.gz"
QUESTIONS = "questions"
POINTS = 40  # of a loss curve
RETRIEVAL_COLUMNS = ("kind", "k", "distance", "chance_in_view", "image_source")


@dataclass(frozen=True)
class Records:
    """Everything that was kept, by name; questions: task -> column -> a value a question."""

    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    questions: dict[str, dict[str, list]] = field(default_factory=dict)

    @property
    def rate_losses(self) -> dict[str, float]:
        """Held-out loss of each rate's job; infinite where training diverged."""
        found = {name: record["loss"] for name, record in self.rates.items()}
        return {name: math.inf if loss is None else loss for name, loss in found.items()}

    def check(self, name: str, fingerprint: str) -> None:
        """Refuse a job's record, if there is one, of something else. Raises UserError."""
        record = (self.cells | self.texts | self.rates).get(name)
        if record is not None and record.get("job") != fingerprint:
            raise UserError(
                f"the record of {name} was made with other settings; give the same flags or "
                "another --records"
            )


def write(folder: Path, name: str, record: Mapping[str, Any]) -> Path:
    """Write a record so that equal records are equal bytes. Raises UserError."""
    content = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    file, part = folder / f"{name}{SUFFIX}", folder / f".{name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(gzip.compress(content, mtime=0))
        part.replace(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    return file


def read(*folders: Path) -> Records:
    """All records of the folders, none where there is no folder. Raises UserError for broken ones.

    A record of a further folder is named with its folder; a rate that was copied is kept once.
    """
    kept = Records()
    homes = {"cell": kept.cells, "text": kept.texts, "rate": kept.rates}
    for start, folder in enumerate(folders, 1):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is no folder of records")
        for file in sorted(folder.glob(f"*{SUFFIX}")):
            name = file.name.removesuffix(SUFFIX)
            try:
                record = json.loads(gzip.decompress(file.read_bytes()))
                home = kept.questions if name == QUESTIONS else homes[record["kind"]]
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file} is no record of a study: {error!r}") from error
            if name == QUESTIONS:
                if kept.questions not in ({}, record):
                    raise UserError(f"{file} has other questions than {folders[0]}")
                kept.questions.update(record)
            elif record["kind"] != "rate" or home.get(name) != record | {"start": 1}:
                home[name if start == 1 else f"{name} in {folder}"] = record | {"start": start}
    _check_starts(kept, folders)
    return kept


def _check_starts(kept: Records, folders: Sequence[Path]) -> None:
    """Refuse folders of cells that started from one text model. Raises UserError."""
    homes: dict[str, int] = {}
    for cell in kept.cells.values():
        model, start = cell.get("started_from"), cell["start"]
        if model is not None and homes.setdefault(model, start) != start:
            a, b = folders[homes[model] - 1], folders[start - 1]
            raise UserError(
                f"{a} and {b} hold cells of {cell['family']} that started from one text model; "
                "they belong in one folder"
            )


def names(folder: Path) -> set[str]:
    """Of the jobs that have a record."""
    return {file.name.removesuffix(SUFFIX) for file in folder.glob(f"*{SUFFIX}")}


def text_record(job: Job, family: str) -> dict[str, Any]:
    """Of a family's text pretraining."""
    lessons = [step.done.parent for step in job.steps]
    stages = {folder.name: curve(folder) for folder in lessons}
    weights = weights_digest(job.steps[-1].done)
    found = {"kind": "text", "family": family, "weights": weights, "stages": stages}
    return found | {"seconds": job.seconds()}


def weights_digest(model: Path) -> str:
    """Of a saved model's weights."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def rate_record(job: Job, family: str, rate: float, loss: float | None) -> dict[str, Any]:
    """Of one learning rate tried; loss: None where training diverged."""
    found = {"kind": "rate", "family": family, "rate": rate, "loss": loss}
    return found | {"seconds": job.seconds()}


def cell_record(job: Job, cell: plan.Cell, start: Path | None) -> dict[str, Any]:
    """Of a trained and questioned model; start: its language model, unless it is published."""
    runs = {name: EvaluationRun.read(job.folder / name) for name in ("evaluation", SIGNS, "blind")}
    asked = {task: scores(runs["evaluation"], task) for task in runs["evaluation"].tasks}
    asked[SIGNS] = scores(runs[SIGNS], SIGNS)
    asked["retrieval_blind"] = scores(runs["blind"], SIGNS)
    config = json.loads((job.folder / "finetune" / "config.json").read_text(encoding="utf-8"))
    settings = runs[SIGNS].record["settings"]
    return {
        "kind": "cell",
        "family": cell.family,
        "connector": cell.connector,
        "seed": cell.seed,
        "order": cell.order,
        "started_from": weights_digest(start) if start else None,
        "data": {name: digests_of(job.folder / name) for name in ("pretrain", "finetune")},
        "hyperparameters": config["hyperparameters"],
        "training": {name: curve(job.folder / name) for name in ("pretrain", "finetune")},
        "tasks": asked,
        "cost": json.loads((job.folder / "cost.json").read_text(encoding="utf-8")),
        "questions_per_s": runs[SIGNS].record["cost"].get("questions_per_s"),
        "seconds": job.seconds(),
        "settings": {k: settings.get(k) for k in ("commit", "device", "dtype", "threads", "torch")},
    }


def digests_of(run: Path) -> list[str]:
    """Of the data files that a training run read."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return config.get("data_digests", [])


def curve(run: Path) -> dict[str, Any]:
    """A training run's log: the loss in POINTS blocks, what was held out, speed and memory."""
    lines = (run / "train.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    size = max(1, -(-len(entries) // POINTS))
    blocks = [entries[at : at + size] for at in range(0, len(entries), size)]
    looked = [entry for entry in entries if "eval_loss" in entry]
    losses = [[entry["loss"] for entry in block if entry["loss"] is not None] for block in blocks]
    found = {
        "steps": len(entries),
        "loss": [
            [block[-1]["step"], round(fmean(values), 4)]
            for block, values in zip(blocks, losses, strict=True)
            if values
        ],
        "tokens": entries[-1]["tokens"],
        "tokens_per_s": median(entry["tokens_per_s"] for entry in entries),
        "peak_mem_bytes": max(entry["peak_mem_bytes"] or 0 for entry in entries),
        "held_out": [[entry["step"], round(entry["eval_loss"], 4)] for entry in looked],
    }
    if looked and "eval_picture_gains" in looked[-1]:
        found["picture_gains"] = [[entry["step"], entry["eval_picture_gains"]] for entry in looked]
    return found


def scores(run: EvaluationRun, task: str) -> dict[str, Any]:
    """The primary metric, and of every question its score (None: it has none, or is not in it)."""
    primary = tasks.load(task).primary_metric
    entry, samples = run.record["tasks"][task], run.samples(task)
    value = entry["metrics"].get(primary, {}).get("value")
    within = {sample.doc_id for sample in run.primary_metric_samples(task)}
    told = [s.score if s.doc_id in within else None for s in samples]
    return {
        "metric": primary,
        "unit": entry["unit"],
        "value": value,
        "n": len(within),
        "digest": digest_of(samples),
        "scores": [None if score is None else round(score, 4) for score in told],
    }


def digest_of(samples: Sequence[Sample]) -> str:
    """Of which questions they are, however they are put."""
    asked = "\n".join(f"{s.doc_id} {s.image}" for s in samples)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def question_record(job: Job) -> dict[str, dict[str, list]]:
    """task -> {"picture": a number for each question's picture}; of retrieval more columns."""
    run = EvaluationRun.read(job.folder / "evaluation")
    found = {task: {"picture": _numbered(run.samples(task))} for task in run.tasks}
    retrieval = EvaluationRun.read(job.folder / SIGNS)
    rows = Source.parse("demo").rows(tasks.load(SIGNS))
    places = [sample.doc_id for sample in retrieval.samples(SIGNS)]
    columns = {name: rows[name] for name in RETRIEVAL_COLUMNS}
    found[SIGNS] = {name: [values[at] for at in places] for name, values in columns.items()}
    scenes = found[SIGNS].pop("image_source")
    found[SIGNS]["picture"] = [list(dict.fromkeys(scenes)).index(scene) for scene in scenes]
    chances = found[SIGNS]["chance_in_view"]
    found[SIGNS]["chance_in_view"] = [round(chance, 5) for chance in chances]
    return found


def _numbered(samples: Sequence[Sample]) -> list[int]:
    """Equal numbers for questions about one picture; one without a picture is alone."""
    keys = [f"row {s.doc_id}" if s.image in (None, NO_IMAGE) else str(s.image) for s in samples]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]
