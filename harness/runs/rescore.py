"""Answers without their model: a run's own samples read back, and any answers written as a run.

    found = read_samples(task, Path("runs/demo/samples_pope.jsonl"))     # with their documents
    write_run(Path("runs/llava"), task, found, report, "paper", path=file, name="LLaVA-1.5-13B")

`harness.score` uses both. A folder written here is read by `harness.compare`, `harness.report` and
`harness.tables` like one of `harness.run`. Several tasks of one model may share a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.data.questions import NO_IMAGE, without_images
from harness.data.readers import Row, read_documents
from harness.runs import older, rerun, schema
from harness.runs.schema import Sample, TaskResult
from harness.runs.store import NAMED, RECORD, EvaluationRun
from harness.scoring.imports import UPLOAD
from harness.scoring.llava_answers import Joined
from tasks.common import HAS_IMAGE, PROTOCOLS, Benchmark, Doc, Report
from vlmamba_core.errors import UserError
from vlmamba_core.folder import RunFolder, digest, explain
from vlmamba_core.paths import file_sha256

NO_ANSWER = "no answer in the file"


@dataclass(frozen=True)
class Answers:
    """One task's answers with their documents; `unanswered` ones have none, each for its reason.

    record: of the run that they are from, if that is known. keyed: the rows know their picture's
    key, as those of a run do. submitted: they are from an upload, see `Benchmark.of_uploads`.
    """

    rows: list[Joined]
    missing: int = 0  # documents that have no answer
    unanswered: list[Joined] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    record: Mapping[str, Any] | None = None
    keyed: bool = False
    submitted: bool = False


def is_samples(rows: Sequence[Row]) -> bool:
    """Whether these are lines of a samples_TASK.jsonl of `harness.run`."""
    return Sample.__dataclass_fields__.keys() <= older.answer(rows[0]).keys()


def read_samples(
    task: Benchmark, rows: Sequence[Row], path: Path, truth: Sequence[Path] = ()
) -> Answers:
    """The answers of a samples file, each joined with the document of its row.

    The documents come from `truth`, in the data's order; without it from the data that the record
    beside the file names. Raises UserError where they are not the ones that were asked.
    """
    run = EvaluationRun.read(path.parent) if (path.parent / RECORD).is_file() else None
    if run is not None and task.name not in run.tasks:
        raise UserError(f"{path.parent} is a run of {', '.join(run.tasks)}, not of {task.name}")
    documents = read_documents(truth, task) if truth else _documents_of(task, run, path)
    samples = [_sample(row, path, number) for number, row in enumerate(rows, 1)]
    asked = [doc for doc in documents if task.asks(doc)]  # a run counts these rows alone
    if len(asked) < len(documents) and not _misplaced(task, samples, asked):
        documents = asked
    _check_same(task, samples, documents, path)
    joined = [
        Joined(str(s.doc_id), documents[s.doc_id], s.prediction or "", s.doc_id, s.image)
        for s in samples
    ]
    pairs = list(zip(samples, joined, strict=True))
    return Answers(
        rows=[row for sample, row in pairs if sample.prediction is not None],
        unanswered=[row for sample, row in pairs if sample.prediction is None],
        reasons=[s.excluded or schema.UNREADABLE for s, _ in pairs if s.prediction is None],
        record=run.record if run else None,
        keyed=True,
        submitted=_scored_from(task, run) == UPLOAD,
    )


def _scored_from(task: Benchmark, run: EvaluationRun | None) -> str | None:
    """The format of the file that a run's answers were read from; None where a model gave them."""
    files = run.record.get("scored_from") if run else None
    return files.get(task.name, {}).get("format") if isinstance(files, dict) else None


def _sample(row: Row, path: Path, number: int) -> Sample:
    row = older.answer(row)
    sample = Sample(**{name: row[name] for name in Sample.__dataclass_fields__})
    answered = sample.prediction is None or isinstance(sample.prediction, str)
    if type(sample.doc_id) is not int or sample.doc_id < 0 or not answered:
        raise UserError(f"{path} line {number} is not an answer of harness.run")
    return sample


def _documents_of(task: Benchmark, run: EvaluationRun | None, path: Path) -> list[Row]:
    """The documents that a run asked, from where its record says."""
    give = f"give the data's files, in order, with --truth: {path.name} holds no whole documents"
    if run is None:
        raise UserError(f"there is no {RECORD} beside {path} to say which data it answers; {give}")
    if "scored_from" in run.record:
        raise UserError(f"{path.parent} was scored from files; score those again, or {give}")
    try:
        source = run.source()
        source.check(task)
        table = source.load(task, str(run.record["protocol"]))
    except UserError as error:
        raise UserError(f"the data that {path} answers cannot be read ({error}); {give}") from error
    return [dict(row) for row in without_images(task.process_docs(table))]


def _check_same(
    task: Benchmark, samples: Sequence[Sample], documents: Sequence[Row], path: Path
) -> None:
    """Raise UserError, with counts, unless every sample is about the document of its row."""
    if wrong := _misplaced(task, samples, documents):
        raise UserError(
            f"{path}: {len(wrong)} of {len(samples)} answers are to other questions than the data "
            f"({len(documents)} rows) has in their rows, the first in row {wrong[0].doc_id + 1} "
            f"({wrong[0].question[:60]!r}); give the data that was asked, with --truth"
        )


def _misplaced(
    task: Benchmark, samples: Sequence[Sample], documents: Sequence[Row]
) -> list[Sample]:
    """The samples that are not about the document of their row."""
    return [
        sample
        for sample in samples
        if sample.doc_id >= len(documents) or not _is_about(task, sample, documents[sample.doc_id])
    ]


def _is_about(task: Benchmark, sample: Sample, doc: Doc) -> bool:
    """The same reference, and the same question, whichever prompt it was put in."""
    if json.loads(json.dumps(task.reference(doc))) != sample.reference:
        return False
    if sample.question in {schema.question_of(task, doc, p) for p in PROTOCOLS}:
        return True
    asked = str(doc.get("question", "")).strip().casefold()
    return bool(asked) and asked in sample.question.casefold()


def write_run(
    out: Path,
    task: Benchmark,
    answers: Answers,
    report: Report,
    protocol: str,
    *,
    path: Path,
    name: str | None = None,
    format: str | None = None,
    truth: Sequence[Path] = (),
    overwrite: bool = False,
) -> EvaluationRun:
    """Write the scored answers of the file `path` into the folder `out`: record and samples.

    A folder with other tasks of this model and protocol gets one more. Raises UserError where
    another run, or another file's answers to this task, stand there and `overwrite` is not given.
    """
    with RunFolder(out) as folder:
        arguments = _arguments(task, answers, protocol, path, name)
        form = UPLOAD if answers.submitted else format or "jsonl"
        file = {"file": path.name, "sha256": _sha256(path), "format": form}
        before = None if overwrite else rerun.finished(out)
        if before is not None:
            _check_may_grow(out, before, task, arguments, file)
        result, samples = _samples(task, answers, report, protocol, arguments["seed"])
        if overwrite:
            folder.clear()
        record = _record(before, task, result, arguments, file, answers, truth)
        rows = [[sample.question, sample.reference, sample.image] for sample in samples]
        record["data"][task.name]["rows_digest"] = digest(rows)
        folder.write(f"samples_{task.name}.jsonl", schema.samples_text(samples))
        folder.write(RECORD, schema.record_text(record))
        explain(out, "harness.score", schema.FILES, "Scores of answers that a file held.")
    return EvaluationRun(out.resolve().name, out, record)


def _sha256(path: Path) -> str:
    """Of a file, or of the files in a folder and their names."""
    if not path.is_dir():
        return file_sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return digest([[file.name, file_sha256(file)] for file in files])


def _arguments(
    task: Benchmark, answers: Answers, protocol: str, path: Path, name: str | None
) -> dict[str, Any]:
    """The run's own where it is known, so that its pictures are found again."""
    kept = dict((answers.record or {}).get("arguments", {}))
    kept |= {"model": name} if name else {}
    absent = {"model": path.stem, "data": "answers from files", "blind": False, "limit": None}
    absent |= {"style": None, "split": None, "seed": 0}
    return {**absent, **kept, "tasks": task.name, "protocol": protocol}


def _check_may_grow(
    out: Path,
    before: Mapping[str, Any],
    task: Benchmark,
    arguments: Mapping[str, Any],
    file: Mapping[str, Any],
) -> None:
    """Raise UserError unless the run in `out` is of these answers' model and settings."""
    scored = before.get("scored_from")
    if not isinstance(scored, dict):
        raise UserError(
            f"{out} holds a finished run that was not scored from files; give another --out, or "
            "--overwrite to replace it"
        )
    kept = before.get("arguments", {})
    differs = [
        f"its {name} is {kept.get(name)!r}"
        for name, value in arguments.items()
        if name != "tasks" and kept.get(name) != value
    ]
    if scored.get(task.name, file) != file:
        differs.append(f"its {task.name} is of another file, {scored[task.name].get('file')}")
    if differs:
        raise UserError(
            f"{out} holds another finished run: {'; '.join(differs)}; give --model the same name "
            "for tasks of one model, another --out, or --overwrite to replace it"
        )


def _samples(
    task: Benchmark, answers: Answers, report: Report, protocol: str, seed: int
) -> tuple[TaskResult, list[Sample]]:
    """The scores with intervals, and the lines of all answers in the order of the data."""
    rows = [*answers.rows, *answers.unanswered]
    predictions = [row.prediction for row in answers.rows]
    result, samples = schema.score_task(
        task,
        [row.doc for row in rows],
        [*predictions, *[None] * len(answers.unanswered)],
        protocol,
        doc_ids=[place if row.row is None else row.row for place, row in enumerate(rows)],
        unanswered=[*[""] * len(predictions), *answers.reasons],
        image_keys=[row.image if answers.keyed else _named(task, row.doc) for row in rows],
        seed=seed,
        report=report,
    )
    if answers.missing:
        result.excluded[NO_ANSWER] = answers.missing
    return result, sorted(samples, key=lambda sample: sample.doc_id)


def _named(task: Benchmark, doc: Doc) -> str | None:
    """In place of a picture's content, the name that says which questions share it."""
    if doc.get(HAS_IMAGE) is False:
        return NO_IMAGE
    cluster = task.cluster(doc)
    return None if cluster == str(id(doc)) else NAMED + cluster


def _record(
    before: Mapping[str, Any] | None,
    task: Benchmark,
    result: TaskResult,
    arguments: Mapping[str, Any],
    file: Mapping[str, Any],
    answers: Answers,
    truth: Sequence[Path],
) -> dict[str, Any]:
    """The folder's record with this task in it."""
    old, own = before or {}, answers.record or {}
    data = dict(own.get("data", {}).get(task.name, {"source": "answers from files"}))
    data |= {"files": [path.name for path in truth]} if truth else {}
    entries = {**old.get("tasks", {}), task.name: schema.result_entry(result)}
    model = own.get("model", {}) if arguments["model"] == _model_of(own) else {}
    return {
        "schema": schema.SCHEMA,
        "kind": "evaluation",
        "label": own.get("label"),
        "arguments": {**arguments, "tasks": ",".join(entries)},
        "data": {**old.get("data", {}), task.name: data},
        "protocol": arguments["protocol"],
        "tasks": entries,
        "scored_from": {**old.get("scored_from", {}), task.name: dict(file)},
        **({"model": model} if model else {}),
        "settings": {"seeds": {"bootstrap": arguments["seed"]}} | schema.environment(),
        "finished": schema.now(),
    }


def _model_of(record: Mapping[str, Any]) -> Any:
    return record.get("arguments", {}).get("model")
