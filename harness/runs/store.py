"""Finished runs read back from disk: evaluations, profiles, ablations.

    runs = find(Path("results/runs"))           # every record.json, by folder
    run = EvaluationRun.read(Path("runs/demo")) # its scores and its answers

No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tasks
from harness.data.questions import NO_IMAGE
from harness.data.readers import read_rows
from harness.data.sources import Source
from harness.runs import older
from harness.runs.schema import Sample, TaskResult, with_marks
from harness.scoring.intervals import Interval, NoInterval
from vlmamba_core.errors import UserError

NAMED = "named "  # starts what stands in place of a key where only the picture's name is known
KINDS = ("evaluation", "profile", "ablation")
RECORD = "record.json"
STYLE_MARKS = {"heldout": "held-out style", "validation": "validation style"}  # of the demo


@dataclass(frozen=True)
class Found:
    """A record under a folder of runs; `name` is its own folder's, with dots for slashes."""

    name: str
    path: Path
    record: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return str(self.record["kind"])


def find(root: Path) -> list[Found]:
    """Every record.json below `root`, sorted by name. Raises UserError without a folder."""
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}; expected one with runs, such as results/runs")
    files = sorted(root.rglob(RECORD))
    names = [".".join(file.parent.relative_to(root).parts) or root.name for file in files]
    return [
        Found(name, file.parent, read_record(file.parent))
        for name, file in sorted(zip(names, files, strict=True))
    ]


def with_those_below(folders: Sequence[Path]) -> list[Path]:
    """The folders; for one without a record those directly below it that have one, if any."""
    found: list[Path] = []
    for folder in folders:
        below = [] if (folder / RECORD).exists() else sorted(folder.glob(f"*/{RECORD}"))
        found += [file.parent for file in below] or [folder]
    return found


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """As much of each path's end as tells the folders apart: "x", or "a/x" and "b/x"."""
    parts = [folder.resolve().parts for folder in folders]
    deepest = max(map(len, parts))
    for length in range(1, deepest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]  # the same folder twice


def marks(arguments: Mapping[str, Any], task: str | None = None) -> list[str]:
    """What sets a run's scores apart from a model's usual ones: said in every row that has them.

    task: with the prompt options that were chosen for it.
    """
    found = ["blind"] * bool(arguments.get("blind"))
    found += [STYLE_MARKS[style] for style in [arguments.get("style")] if style in STYLE_MARKS]
    found += [f"split {arguments['split']}"] if arguments.get("split") else []
    found += [f"data {arguments['data_id']}"] if arguments.get("data_id") else []
    options = tasks.load(task).prompt_options if task in tasks.NAMES else ()
    if (votes := arguments.get("votes") or 1) > 1:
        found.append(f"{votes} votes")
    elif arguments.get("temperature"):
        found.append(f"temperature {arguments['temperature']:g}")
    found += [f"{arguments['quantize']} weights"] if arguments.get("quantize") else []
    return found + [f"{name} {arguments[name]}" for name in options if arguments.get(name)]


def template_of(record: Mapping[str, Any]) -> str:
    """The name of the template around the questions; "not recorded" where nobody wrote it down."""
    return (record.get("model", {}).get("template") or {}).get("name", "not recorded")


def read_record(folder: Path, kind_of: str | None = None) -> Mapping[str, Any]:
    """The record in a run's folder, checked. Raises UserError for none, a foreign or a cut one.

    kind_of: the only kind that will do.
    """
    file = folder / RECORD
    try:
        record = older.record(json.loads(file.read_text(encoding="utf-8")))
        kind = record["kind"]
    except FileNotFoundError as error:
        raise UserError(f"no {RECORD} in {folder}; expected a finished run's folder") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a run's record: {error!r}") from error
    if kind not in KINDS:
        raise UserError(f"{file} is of kind {kind!r}; expected one of {', '.join(KINDS)}")
    if kind_of not in (None, kind):
        raise UserError(f"{folder} holds a {kind}; expected a run of harness.run")
    from harness.runs.checks import check_record  # pydantic: not before a record is read

    check_record(record, file)
    return record


@dataclass(frozen=True)
class EvaluationRun:
    """What `harness.run` left behind."""

    name: str
    path: Path
    record: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> EvaluationRun:
        """The run in `folder`, called by its name if not `name`. Raises UserError otherwise."""
        record = read_record(folder, "evaluation")
        return cls(name or folder.resolve().name, folder, record)

    @property
    def tasks(self) -> list[str]:
        """The tasks it ran, in order."""
        return list(self.record["tasks"])

    @property
    def title(self) -> str:
        """What it was, in one line."""
        arguments = self.record["arguments"]
        whose = "answers of" if "scored_from" in self.record else "model"
        parts = [f"{whose} {arguments['model']}", f"protocol {self.record['protocol']}"]
        parts += [f"template {self.template}"]
        return f"{self.name}: {', '.join([*parts, *self._apart()])}"

    @property
    def marked(self) -> str:
        """Its name, and in brackets what sets it apart: for rows beside other runs."""
        return with_marks(self.name, self._apart())

    @property
    def template(self) -> str:
        """See `template_of`."""
        return template_of(self.record)

    @property
    def marks(self) -> list[str]:
        """See `marks`."""
        return marks(self.record["arguments"])

    def _apart(self) -> list[str]:
        limit = self.record["arguments"].get("limit")
        return self.marks + ([f"first {limit} questions"] if limit else [])

    def results(self) -> list[TaskResult]:
        """The scores as `harness.tables` shows them."""
        return [
            replace(task_result(name, entry), marks=tuple(marks(self.record["arguments"], name)))
            for name, entry in self.record["tasks"].items()
        ]

    def primary_metric_samples(self, task: str) -> list[Sample]:
        """The samples that the task's primary metric covers."""
        with_image = task in tasks.NAMES and tasks.load(task).primary_metric_needs_image
        return [
            sample for sample in self.samples(task) if not (with_image and sample.image == NO_IMAGE)
        ]

    def samples(self, task: str) -> list[Sample]:
        """Every answer of a task. Raises UserError for a missing or foreign file."""
        file = self.path / f"samples_{task}.jsonl"
        if not file.exists():
            return []
        try:
            samples = [Sample(**older.answer(row)) for row in read_rows(file)]
        except TypeError as error:
            raise UserError(f"{file} does not hold samples of harness.run: {error}") from error
        from harness.runs.checks import check_samples

        check_samples(samples, file)
        return samples

    def source(self) -> Source:
        """Where its rows came from. Raises UserError where that is gone."""
        arguments = self.record["arguments"]
        return Source.parse(
            arguments["data"],
            arguments.get("style"),
            split=arguments.get("split"),
            dataset=arguments.get("data_id"),
            revision=arguments.get("data_revision"),
        )


def task_result(name: str, entry: Mapping[str, Any]) -> TaskResult:
    """A task's part of a record as the object it was written from."""
    metrics = entry["metrics"]
    known = tasks.load(name).metrics if name in tasks.NAMES else tuple(metrics)
    return TaskResult(
        task=name,
        unit=entry["unit"],
        overall_metrics=tuple(m for m in known if "/" not in m),
        metrics={key: found["value"] for key, found in metrics.items()},
        intervals={
            key: interval for key, found in metrics.items() if (interval := _interval(found))
        },
        n=entry["n"],
        n_unparsed=entry["n_unparsed"],
        excluded=entry["excluded"],
        notes=entry["notes"],
        metric_n={key: found["n"] for key, found in metrics.items() if "n" in found},
    )


def _interval(found: Mapping[str, Any]) -> Interval | NoInterval | None:
    """A metric's interval, why it has none, or None where a record says neither."""
    if "low" in found:
        return Interval(found["low"], found["high"], found["method"])
    return NoInterval(found["no_interval"]) if "no_interval" in found else None
