"""From a model's answers to scores, files and the table on the terminal.

`finish` scores every task, checks the scores against lmms-eval's (`harness.scoring.official`), and
writes record.json, samples_TASK.jsonl, table.md and submission files into the run's folder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch

from harness.data.sources import Source
from harness.models.lmms import NO_IMAGE, UNREADABLE, VLMamba
from harness.models.lmms_tasks import Answers, quiet
from harness.reporting import render
from harness.runs import schema
from harness.runs.schema import Sample, TaskResult
from harness.runs.store import marks
from harness.scoring import official, submit
from harness.scoring.judge import Judge
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal, RunFolder, digest

Arguments = Mapping[str, Any]


def load_model(args: argparse.Namespace, journal: AnswerJournal) -> VLMamba:
    """The model behind lmms-eval's interface, with everything its answers depend on noted."""
    return VLMamba(
        pretrained=args.model,
        revision=args.revision,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        blind=args.blind,
        journal=journal,
    )


@dataclass(frozen=True)
class Run:
    """What a run was asked to do, and where its files go."""

    arguments: Arguments  # the command line's, as the record keeps them
    source: Source
    folder: RunFolder
    rows: Mapping[str, datasets.Dataset]  # task -> all rows of the chosen split
    submit_to: Path | None = None
    wanted: Mapping[str, submit.Wanted] = field(default_factory=dict)  # what is known of servers
    judge: Judge | None = None
    overwrite: bool = False  # another finished run in the folder makes way


def finish(run: Run, model: VLMamba, answers: Sequence[Answers], started: float) -> dict[str, Any]:
    """Score, check against lmms-eval, write the files and print the table.

    started: perf_counter() at the start. Returns the record.
    """
    if run.overwrite:
        run.folder.clear()
    results: list[TaskResult] = []
    checks: dict[str, str] = {}
    against: dict[str, str] = {}
    data: dict[str, dict[str, Any]] = {}
    prompts: dict[str, dict[str, str]] = {}
    for answer in answers:
        result, samples = score(run, answer)
        results.append(replace(result, marks=tuple(marks(run.arguments, result.task))))
        asked = [[sample.question, sample.truth, sample.image] for sample in samples]
        which = run.source.describe(answer.task, run.rows[result.task])
        prompts[result.task] = answer.task.prompt_choices(run.arguments["protocol"])
        data[result.task] = {**which, "rows_digest": digest(asked)}
        judged = run.judge is not None and answer.task.judged
        checks[result.task], against[result.task] = (
            ("not made: a judge helped", "nothing")
            if judged
            else compare(result, samples, answer, run.arguments["protocol"])
        )
        run.folder.write(f"samples_{result.task}.jsonl", schema.samples_text(samples))
    arguments, source = run.arguments, run.source
    title = title_line(arguments, source)
    record = {
        "schema": schema.SCHEMA,
        "kind": "evaluation",
        "label": source.label,
        "arguments": dict(arguments),
        "data": data,
        "protocol": arguments["protocol"],
        "prompts": prompts,
        "tasks": {result.task: schema.result_entry(result) for result in results},
        "lmms_eval_check": checks,
        "lmms_eval_check_against": against,
        **terms_of(arguments, model),
        "events": model.answers.events,
        "timing": {**model.answers.timing, "total_s": time.perf_counter() - started},
        "finished": schema.now(),
    }
    run.folder.write("record.json", schema.record_text(record))
    run.folder.write("table.md", render.report(results, title, markdown=True))
    report_to_terminal(model, checks, run.folder.path, render.report(results, title))
    return record


def score(run: Run, answer: Answers) -> tuple[TaskResult, list[Sample]]:
    """A task's scores and per-question lines; its submission file where one is due."""
    result, samples = schema.score_task(
        answer.task,
        answer.docs,
        [None if p == UNREADABLE else p for p in answer.predictions],
        run.arguments["protocol"],
        doc_ids=answer.doc_ids,
        image_keys=answer.image_keys,
        seed=run.arguments["seed"],
        judge=run.judge,
    )
    result.notes.extend(write_submission(run, answer, scored=bool(result.metrics)))
    return result, samples


def write_submission(run: Run, answer: Answers, scored: bool) -> list[str]:
    """Write the file for a benchmark's server, if asked to or without a score; and the notes on it.

    A question whose image is unreadable gets an empty answer: servers want all questions.
    """
    name = submit.file_name(answer.task)
    if name is None or (scored and run.submit_to is None):
        return []
    path = (run.submit_to or run.folder.path) / name
    unreadable = answer.predictions.count(UNREADABLE)
    predictions = ["" if text == UNREADABLE else text for text in answer.predictions]
    why = "" if scored else "no score is made here; "
    try:
        wanted = run.wanted.get(answer.task.name) or submit.wanted(
            answer.task, run.source, run.rows[answer.task.name]
        )
        n, about = submit.write(answer.task, answer.docs, predictions, path, wanted)
    except UserError as error:
        if run.submit_to is not None:
            raise
        return [f"{why}nothing for the test server: {error}"]  # nobody asked for the file
    notes = [f"{why}for the test server: {n} answers in {path}"]
    if unreadable:
        notes.append(f"{unreadable} answers in it are empty: their images are unreadable")
    return notes + about


def compare(
    result: TaskResult, samples: Sequence[Sample], answer: Answers, protocol: str
) -> tuple[str, str]:
    """ "equal" or the metrics that differ, and the name of what they were compared with.

    Our functions must give the same under lmms-eval's evaluator; where lmms-eval has a task of its
    own, that has to agree too. Whether a question had an image is told by what the model was shown.
    """
    different = [
        f"{name}: {result.metrics.get(name, math.nan)} here, {value} in lmms-eval"
        for name, value in answer.engine.items()
        if math.isfinite(value) != (name in result.metrics)
        or (name in result.metrics and not math.isclose(value, result.metrics[name], abs_tol=1e-9))
    ]
    given = [
        official.Given(answer.rows[sample.doc_id], sample, with_image=sample.image != NO_IMAGE)
        for sample in samples
        if sample.prediction is not None
    ]
    with quiet():
        theirs, against = official.check(answer.task, result.metrics, given, protocol)
    return "; ".join([*different, *theirs]) or "equal", against


def terms_of(arguments: Arguments, model: VLMamba) -> dict[str, Any]:
    """The record's parts that are known before the first question: model and terms."""
    return {
        "model": {"name": arguments["model"], **model.evaluated.describe()},
        "terms": terms(arguments, model) | schema.environment(),
    }


def terms(arguments: Arguments, model: VLMamba) -> dict[str, Any]:
    """Under which terms the answers were made."""
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    known = model.answers.provenance
    return {
        **{name: value for name, value in known.items() if name != "model_sha256"},
        "device_name": gpu,
        "batch_size": arguments["batch_size"],
        "processes": model.world_size,
        "threads": torch.get_num_threads(),
        "seeds": dict.fromkeys(("bootstrap", "python", "numpy", "torch"), arguments["seed"]),
    }


def title_line(arguments: Arguments, source: Source) -> str:
    """What the table is about, and what its numbers may not be compared with."""
    parts = [f"model {arguments['model']}", f"data {source.name}"]
    parts += [f"protocol {arguments['protocol']}"]
    parts += ["blind (image features replaced by their mean)"] if arguments["blind"] else []
    parts += [f"first {arguments['limit']} questions only"] if arguments["limit"] else []
    line = ", ".join(parts)
    return f"{line}\n{source.label}" if source.label else line


def report_to_terminal(model: VLMamba, checks: dict[str, str], out: Path, table: str) -> None:
    """The table on stdout; what went wrong on stderr."""
    for event in model.answers.events[:5]:
        print(f"note: {event}", file=sys.stderr)
    if len(model.answers.events) > 5:
        print(f"note: and {len(model.answers.events) - 5} more, see record.json", file=sys.stderr)
    for task, check in checks.items():
        if check != "equal" and not check.startswith("not made"):
            print(f"warning: {task}: lmms-eval's aggregate differs: {check}", file=sys.stderr)
    print(table)
    resumed = model.answers.timing["resumed_answers"]
    kept = f" ({resumed} answers were already there)" if resumed else ""
    print(f"written to {out}: record.json, table.md, samples_*.jsonl{kept}")
