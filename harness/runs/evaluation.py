"""An evaluation from its rows to its record, in the order of the functions below.

    asked = [Asked(task, questions.read(task, rows, protocol, limit)), ...]  # rows, read once
    predictions = ask(model, asked)              # requests -> answers, by any EvalModel
    outcome = score(run, asked, predictions)     # answers -> cases -> metrics with intervals
    record = write(run, model, outcome, started) # samples_TASK.jsonl, submissions, record.json
    check(run, record, asked, outcome)           # beside lmms-eval's own scores

Every answer is scored once and aggregated once; intervals come from the same cases.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.images import UnreadableImage
from harness.data.questions import NO_IMAGE, OwnRows, Question
from harness.data.sources import Source
from harness.models import cost, ranks
from harness.models.base import EvalModel, Limits, Picture, Request
from harness.models.resumable import Resumable
from harness.runs import schema
from harness.runs.schema import Sample, TaskResult
from harness.runs.store import marks, template_of
from harness.scoring import official, submit
from harness.scoring.judge import Judge
from tasks.common import Benchmark
from vlmamba_core.errors import UserError
from vlmamba_core.folder import RunFolder, digest

if TYPE_CHECKING:
    import datasets

Arguments = Mapping[str, Any]
Answer = str | None  # None: the image could not be read
# Parts of answering by their names in a record's `timing`, as the last line of a run says them
PARTS = {
    "processor_s": "processor",
    "encode_s": "encode",
    "encode_prefill_s": "encode and prefill",
    "prefill_s": "prefill",
    "decode_s": "decode",
    "model_s": "model",
}


@dataclass(frozen=True)
class Asked:
    """A benchmark and the questions of it that are asked."""

    task: Benchmark
    questions: Sequence[Question]


@dataclass(frozen=True)
class Outcome:
    """A task's scores, and a line for each question."""

    result: TaskResult
    samples: list[Sample]


@dataclass(frozen=True)
class Run:
    """What a run was asked to do, and where its files go."""

    arguments: Arguments  # the command line's, as the record keeps them
    source: Source
    folder: RunFolder
    rows: Callable[[Benchmark], datasets.Dataset]  # all of the chosen split's
    submit_to: Path | None = None
    wanted: Mapping[str, submit.Wanted] = field(default_factory=dict)  # what is known of servers
    judge: Judge | None = None

    @property
    def protocol(self) -> str:
        """The rules of prompts and scores."""
        return self.arguments["protocol"]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and, where a model has loaded it, PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def ask(
    model: Resumable, asked: Sequence[Asked], protocol: str, votes: int = 1
) -> list[list[Answer]] | None:
    """An answer to each question, by task; None on every process of a run but the first.

    votes: of sampled answers, how many to each question; they stand one after the other.
    Raises UserError where the model does not offer what a task asks for.
    """
    questions = [question for task in asked for question in task.questions]
    for question in questions:
        if question.image_key is None:
            model.note(f"{question.task.name}: row {question.row + 1}: {question.trouble}")
    pieces = [
        (place, request)
        for place, question in enumerate(questions)
        if question.image_key is not None
        for request in requests_of(question, protocol, votes)
    ]
    requests = [request for _, request in pieces]
    refuse_what_is_not_offered(model.model, requests)
    mine = ranks.share([request.image_key for request in requests])
    answers = model.answer([requests[number] for number in mine])
    found = ranks.gather(list(zip(mine, answers, strict=True)))
    model.gather()
    if ranks.rank() > 0:
        return None
    given: list[list[Answer]] = [[] for _ in questions]
    for number, answer in sorted(pair for part in found for pair in part):
        given[pieces[number][0]].append(answer)
    rest = iter(given)
    return [
        [answer for q in task.questions for answer in answers_to(q, next(rest), votes)]
        for task in asked
    ]


def answers_to(question: Question, given: list[Answer], votes: int) -> list[Answer]:
    """A question's answers, as many as votes, from those to its requests."""
    if not given:
        return [None] * votes
    if not isinstance(question.task, OwnRows) or votes > 1:
        return given
    texts = [answer for answer in given if answer is not None]
    return [question.task.together(texts) if len(texts) == len(given) else None]


def refuse_what_is_not_offered(model: EvalModel, requests: Sequence[Request]) -> None:
    """Raise UserError where a task asks for what the model does not offer."""
    for request in requests:
        if lacking := request.needs - model.offers:
            raise UserError(
                f"{request.task} asks for {min(lacking)}, which model {model.name} does not offer"
            )


def requests_of(question: Question, protocol: str, votes: int = 1) -> list[Request]:
    """What a model is asked for a question: once, for each vote, or what an `OwnRows` says."""
    made = question.requests or [request_of(question, protocol)]
    if votes == 1:
        return list(made)
    if len(made) > 1 or made[0].continuation is not None:
        raise UserError(
            f"--votes: {question.task.name} asks several times about a question, or for "
            "likelihoods: there is no majority to count"
        )
    return [replace(made[0], vote=vote) for vote in range(votes)]


def request_of(question: Question, protocol: str) -> Request:
    """The question as any model is asked it."""
    task = question.task
    return Request(
        task=task.name,
        row=question.row,
        prompt=question.prompt,
        pictures=tuple(
            Picture(key, functools.partial(question.picture, place))
            for place, key in enumerate(question.image_keys)
        ),
        limits=Limits(task.max_new_tokens(protocol), task.stop(protocol)),
    )


def score(
    run: Run,
    asked: Asked,
    predictions: Sequence[Answer],
    refused: Mapping[tuple[str, int], str] | None = None,
) -> Outcome:
    """A task's scores and per-question lines; its submission file where one is due.

    refused: (task, row) -> why the model has no answer; without an entry the image was unreadable.
    """
    questions, refused = asked.questions, refused or {}
    why = [
        question.refusal or refused.get((asked.task.name, question.row), schema.UNREADABLE)
        for question in questions
    ]
    if isinstance(asked.task, OwnRows):
        asked.task.keep_files(run.folder.path)
    result, samples = schema.score_task(
        asked.task,
        [question.doc for question in questions],
        predictions,
        run.protocol,
        doc_ids=[question.row for question in questions],
        image_keys=[question.image_key for question in questions],
        prompts=[question.prompt for question in questions],
        references=[question.reference for question in questions],
        unanswered=why,
        seed=run.arguments["seed"],
        judge=run.judge,
    )
    scored = bool(result.metrics)
    result.notes.extend(write_submission(run, asked, predictions, why, scored=scored))
    named = replace(result, marks=tuple(marks(run.arguments, result.task)))
    return Outcome(named, samples)


def write(
    run: Run, model: Resumable, asked: Sequence[Asked], outcomes: Sequence[Outcome], started: float
) -> dict[str, Any]:
    """Write every line of answers and the record, which is returned.

    started: perf_counter() at the start.
    """
    arguments, source = run.arguments, run.source
    data: dict[str, dict[str, Any]] = {}
    for task, outcome in zip(asked, outcomes, strict=True):
        name, samples = task.task.name, outcome.samples
        rows = [[sample.question, sample.reference, sample.image] for sample in samples]
        which = described(run, task.task)
        data[name] = {**which, "rows_digest": digest(rows)}
        run.folder.write(f"samples_{name}.jsonl", schema.samples_text(samples))
    record = {
        "schema": schema.SCHEMA,
        "kind": "evaluation",
        "label": source.label,
        "arguments": dict(arguments),
        "data": data,
        "protocol": run.protocol,
        "prompts": {one.task.name: one.task.prompt_choices(run.protocol) for one in asked},
        "tasks": {o.result.task: schema.result_entry(o.result) for o in outcomes},
        "lmms_eval_check": {one.task.name: "not made yet" for one in asked},
        "lmms_eval_check_against": {one.task.name: official.NOTHING for one in asked},
        **terms_of(arguments, model),
        "cost": cost_of(model),
        "events": model.events,
        "timing": {**model.timing, "total_s": time.perf_counter() - started},
        "finished": schema.now(),
    }
    run.folder.write("record.json", schema.record_text(record))
    return record


def described(run: Run, task: Benchmark) -> dict[str, Any]:
    """The settings of a task's data."""
    if isinstance(task, OwnRows):
        return task.described(run.source)
    return run.source.describe(task, run.rows(task) if run.source.kind == "hub" else None)


def check(
    run: Run, record: dict[str, Any], asked: Sequence[Asked], outcomes: Sequence[Outcome]
) -> list[str]:
    """Compare the scores with lmms-eval's own and write that into the record; what differs.

    All else is written by then: loading lmms-eval takes seconds.
    """
    warned = []
    for task, outcome in zip(asked, outcomes, strict=True):
        name = task.task.name
        found, against = compare(run, task, outcome)
        record["lmms_eval_check"][name] = found
        record["lmms_eval_check_against"][name] = against
        if found != "equal" and not found.startswith("not made"):
            warned.append(f"{name}: lmms-eval's own score differs: {found}")
    run.folder.write("record.json", schema.record_text(record))
    return warned


def compare(run: Run, asked: Asked, outcome: Outcome) -> tuple[str, str]:
    """ "equal", what differs, or why no check was made; and the name of what was compared with.

    Whether a question had an image is told by what the model was shown.
    """
    task, limit = asked.task, run.arguments["limit"]
    if isinstance(task, OwnRows):
        return "not made: the scores are lmms-eval's own", official.NOTHING
    if run.judge is not None and task.judged:
        return "not made: a judge helped", official.NOTHING
    if why := official.skipped(task, run.protocol, limit):
        return f"not made: {why}", official.NOTHING
    given = [
        official.Given(
            row=question.doc,
            answer=sample.prediction,
            parsed=sample.parsed,
            reference=sample.reference,
            with_image=sample.image != NO_IMAGE,
            excluded=sample.excluded,
        )
        for question, sample in zip(asked.questions, outcome.samples, strict=True)
        if sample.prediction is not None
    ]
    different, against = official.check(task, outcome.result.metrics, given, run.protocol)
    if against.startswith(official.NOTHING):
        return "not made: lmms-eval has nothing to compare these rows with", against
    return "; ".join(different) or "equal", against


def write_submission(
    run: Run, asked: Asked, predictions: Sequence[Answer], reasons: Sequence[str], scored: bool
) -> list[str]:
    """Write the file for a benchmark's server, if asked to or without a score; and the notes on it.

    A question without an answer gets an empty one: servers want all questions.  reasons: why each
    has none, where it has none.
    """
    task = asked.task
    name = submit.file_name(task)
    if name is None or (scored and run.submit_to is None):
        return []
    path = (run.submit_to or run.folder.path) / name
    pairs = zip(predictions, reasons, strict=True)
    empty = schema.counted([why for answer, why in pairs if answer is None])
    docs, answers = [question.doc for question in asked.questions], [p or "" for p in predictions]
    why = "" if scored else "no score is made here; "
    try:
        wanted = run.wanted.get(task.name) or submit.wanted(task, run.source, run.rows(task))
        n, about = submit.write(task, docs, answers, path, wanted)
    except UserError as error:
        if run.submit_to is not None:
            raise
        return [f"{why}nothing for the test server: {error}"]  # nobody asked for the file
    notes = [f"{why}for the test server: {n} answers in {path}"]
    notes += [f"{count} answers in it are empty: {reason}" for reason, count in empty.items()]
    return notes + about


def measure_cost(model: Resumable, asked: Sequence[Asked], protocol: str) -> dict[str, Any]:
    """What one question costs, measured on the first with a picture; empty where none can be read.

    A model that offers no way to measure it is noted.
    """
    for question in (question for one in asked for question in one.questions):
        if question.image_key is None:
            continue
        request, *_ = requests_of(question, protocol)
        if not request.pictures:
            continue
        try:
            return cost.measure(model.model, request).record()
        except UnreadableImage:
            continue
        except UserError as error:
            model.note(str(error))
            break
    return {}


def cost_of(model: Resumable) -> dict[str, Any]:
    """The record's part on cost: what every run tells, and what `measure_cost` found."""
    timing = model.timing
    rate = timing["questions"] / timing["generate_s"] if timing["questions"] else None
    device = device_name(model.model) or getattr(model.model.device, "type", None)
    found = {"parameters": model.model.parameters, "questions_per_s": rate, "device": device}
    return found | model.cost


def say_cost(found: Mapping[str, Any]) -> str:
    """One line on what was measured by `measure_cost`; empty where nothing was."""
    if "total_s" not in found:
        return ""
    parts = [f"first token after {found['first_token_s']:.3g} s"]
    if found["tokens_per_s"] is not None:
        rate = f"{found['tokens_per_s']:.3g} tokens/s"
        parts.append(f"{found['new_tokens']} new tokens / total time, batch 1: {rate}")
    if found["peak_mem_bytes"] is not None:
        parts.append(f"peak memory {found['peak_mem_bytes'] / 2**30:.3g} GiB")
    return "one question: " + ", ".join(parts)


def terms_of(arguments: Arguments, model: Resumable) -> dict[str, Any]:
    """The record's parts that are known before the first question: model and settings."""
    return {
        "model": {"name": arguments["model"], **model.model.describe()},
        "settings": settings(arguments, model) | schema.environment(),
    }


def settings(arguments: Arguments, model: Resumable) -> dict[str, Any]:
    """Under which settings the answers were made."""
    torch = sys.modules.get("torch")  # where the model has a use for it
    seeded = ("bootstrap", "python", "numpy", "torch")
    return {
        **{name: value for name, value in model.provenance.items() if name != "model_sha256"},
        "device_name": device_name(model.model),
        "batch_size": arguments["batch_size"],
        "processes": ranks.world_size(),
        "threads": torch.get_num_threads() if torch else None,
        "seeds": dict.fromkeys(seeded, arguments["seed"]),
    }


def device_name(model: EvalModel) -> str | None:
    """What the GPU that the model is on calls itself; None for one that is on none."""
    device = getattr(model, "device", None)
    if getattr(device, "type", None) != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name(device)


def title_line(arguments: Arguments, source: Source, model: Mapping[str, Any]) -> str:
    """What the table is about, and what its numbers may not be compared with."""
    parts = [f"model {arguments['model']}", f"data {source.name}"]
    parts += [f"protocol {arguments['protocol']}", f"template {template_of({'model': model})}"]
    if (votes := arguments.get("votes") or 1) > 1:
        parts += [f"majority of {votes} votes at temperature {arguments['temperature']:g}"]
    elif arguments.get("temperature"):
        parts += [f"temperature {arguments['temperature']:g}"]
    parts += ["blind (image features replaced by their mean)"] if arguments["blind"] else []
    parts += [f"first {arguments['limit']} questions only"] if arguments["limit"] else []
    line = ", ".join(parts)
    return f"{line}\n{source.label}" if source.label else line


def say_where_the_time_went(timing: Mapping[str, Any]) -> str:
    """One line: questions a second, and the seconds of each part.

    Answering is parted as far as the model tells; what is left of it (journal, batches, a blind
    run's mean) is "other answering".
    """
    known = {shown: timing[name] for name, shown in PARTS.items() if name in timing}
    answering = timing["generate_s"] - timing["decode_images_s"] - sum(known.values())
    parts = {
        "decoding images": timing["decode_images_s"],
        **known,
        "other answering": answering,
        **({"some also alone": timing["alone_s"]} if "alone_s" in timing else {}),
        "scoring": timing.get("score_s", 0.0),
    }
    rate = timing["questions"] / timing["generate_s"] if timing["generate_s"] else 0.0
    seconds = ", ".join(f"{what} {spent:.1f} s" for what, spent in parts.items())
    rest = timing["total_s"] - sum(parts.values())
    return f"{rate:.1f} questions/s; {seconds}, loading {rest:.1f} s"


@contextlib.contextmanager
def quiet(active: bool = True) -> Iterator[None]:
    """The libraries without their log lines and many progress bars, while `active`."""
    if not active:
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when they are loaded
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
