"""What a run leaves behind: scores with their settings, and one line per question.

`record.json` holds everything a rerun needs (arguments, commit, packages, device, seeds) beside
the scores; `samples_TASK.jsonl` holds every answer; `table.md` is for reading.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.data.readers import repeat_note
from harness.models.code import code_sha256
from harness.scoring import judge as judging
from harness.scoring.intervals import Interval, NoInterval, intervals
from harness.scoring.judge import Judge
from tasks.common import Benchmark, Case, Report, Unit
from vlmamba_core.errors import UserError

SCHEMA = 1
PACKAGES = (
    "vlmamba-harness",
    "torch",
    "torchvision",
    "transformers",
    "lmms-eval",
    "datasets",
    "accelerate",
    "timm",
    "numpy",
    "pillow",
    "mamba-ssm",
    "causal-conv1d",
)
# What lies in a run's folder, as its README.md says it
FILES = {
    "record.json": "every score with its interval, and the settings; written last",
    "table.md": "the printed table",
    "samples_*.jsonl": "one line a question: prompt, answer, how it was read, its score",
}
ASKED_FILES = FILES | {
    "votes_*.jsonl": "with --votes: every sampled answer",
    "answers.rank*.jsonl": "kept answers (a journal, one file a process): the same command, or one "
    "with --overwrite and more tasks, questions or votes, takes them from here and asks only the "
    "rest. Once record.json is there it may be deleted: the answers are in the samples too",
    "judge.replies.jsonl": "kept replies of the judge, likewise",
    "*_submission*": "for a benchmark's test server",
}
NOTE = "Without record.json the run is not finished: the same command goes on with it."
UNREADABLE = "unreadable image"  # why a question has no answer, unless the model says otherwise
MOST_REASONS = 3  # of the models' own, told apart in a table
ROOT = Path(__file__).resolve().parents[2]
# What two runs of one command may differ in: times, and what is measured of the machine. All else
# in record.json, points.jsonl, train.jsonl and summary.json is the same, killed and resumed or not.
TIMING_FIELDS = frozenset(
    (
        *("timing", "finished", "cost"),  # record.json
        *("machine", "summary", "load_average", "other_load_cores"),  # a profile's
        *("decode_s", "prefill_s", "ttft_s"),
        *("decode_tok_per_s", "prefill_energy_j", "decode_energy_j_per_tok"),
        *("loaded_mem_bytes", "prefill_peak_mem_bytes", "decode_peak_mem_bytes"),
        *("seconds", "tokens_per_s", "peak_mem_bytes"),  # the trainer's
    )
)


@dataclass(frozen=True)
class TaskResult:
    """A task's scores: `metrics` in their own unit, with intervals or why there are none."""

    task: str
    unit: Unit
    overall_metrics: tuple[str, ...]
    metrics: dict[str, float]
    intervals: Mapping[str, Interval | NoInterval]
    n: int
    n_unparsed: int
    excluded: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metric_n: dict[str, int] = field(default_factory=dict)  # where a metric is not over all n
    marks: tuple[str, ...] = ()  # "blind" and the like, said in every row of a table

    def counts_note(self) -> str:
        """No score, answers not understood, rows left out, in words; empty when all is well."""
        notes = [] if self.metrics else ["no score"]
        notes += [f"{self.n_unparsed} not understood"] if self.n_unparsed else []
        notes += [f"{count} left out: {reason}" for reason, count in self.excluded.items()]
        return "; ".join(notes)


def with_marks(name: str, marks: Sequence[str]) -> str:
    """ "name (blind, held-out style)"; the name alone without marks."""
    return f"{name} ({', '.join(marks)})" if marks else name


@dataclass(frozen=True)
class Sample:
    """One line of samples_TASK.jsonl."""

    doc_id: int
    question: str
    prediction: str | None
    parsed: str | None
    reference: Any
    score: float | None
    image: str | None
    excluded: str | None = None


def score_task(
    task: Benchmark,
    docs: Sequence[Mapping[str, Any]],
    predictions: Sequence[str | None],
    protocol: str,
    *,
    doc_ids: Sequence[int] | None = None,
    image_keys: Sequence[str | None] | None = None,
    prompts: Sequence[str] | None = None,
    references: Sequence[Any] | None = None,
    unanswered: Sequence[str] | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    report: Report | None = None,
) -> tuple[TaskResult, list[Sample]]:
    """Scores, intervals and per-sample lines. A prediction of None: there is no answer.

    `unanswered`: why, for each document (default: its image was unreadable).
    `prompts` and `references`: of the documents, where they are made already. `judge` helps with
    the tasks that need a model to grade or read answers. `report`: of the readable answers, where
    they are scored already.
    """
    prompts = prompts or [question_of(task, doc, protocol) for doc in docs]
    references = references or [task.reference(doc) for doc in docs]
    doc_ids = range(len(docs)) if doc_ids is None else doc_ids
    image_keys = [None] * len(docs) if image_keys is None else image_keys
    readable = [row for row, prediction in enumerate(predictions) if prediction is not None]
    kept_docs = [docs[row] for row in readable]
    answers = [prediction for prediction in predictions if prediction is not None]
    notes: list[str] = []
    if report is None:
        report = judging.evaluate(task, kept_docs, answers, protocol, judge)
        notes = repeat_note(list(zip(docs, image_keys, strict=True)))
    cases: dict[int, Case | None] = dict(zip(readable, report.cases, strict=True))
    reasons = task.exclude(kept_docs, protocol)
    excluded = dict(report.excluded)
    unanswered = [UNREADABLE] * len(docs) if unanswered is None else unanswered
    pairs = zip(predictions, unanswered, strict=True)
    excluded |= counted([reason for prediction, reason in pairs if prediction is None])
    result = replace(
        result_of(task, kept_docs, report, protocol, seed=seed),
        excluded=excluded,
        notes=[*report.notes, *notes],
    )
    ungraded = [None if case is not None else "not graded" for case in report.cases]
    why = {row: reasons.get(place, ungraded[place]) for place, row in enumerate(readable)}
    samples = [
        Sample(
            doc_id=doc_ids[row],
            question=prompts[row],
            prediction=prediction,
            parsed=case.parsed if (case := cases.get(row)) else None,
            reference=references[row],
            score=case.score if case else None,
            image=image_keys[row],
            excluded=why.get(row, unanswered[row]),
        )
        for row, prediction in enumerate(predictions)
    ]
    return result, samples


def counted(reasons: Sequence[str]) -> dict[str, int]:
    """Reason -> how often; many that the models gave, one by one in the samples, are one here."""
    found = Counter(reasons)
    own = [reason for reason in found if reason != UNREADABLE]
    if len(own) > MOST_REASONS:
        together = sum(found.pop(reason) for reason in own)
        found[f"not answered, for {len(own)} reasons (see the samples)"] = together
    return dict(found)


def result_of(
    task: Benchmark,
    docs: Sequence[Mapping[str, Any]],
    report: Report,
    protocol: str,
    *,
    seed: int = 0,
) -> TaskResult:
    """A report with its intervals."""
    return TaskResult(
        task=task.name,
        unit=report.unit or task.unit,
        overall_metrics=tuple(m for m in task.metrics or report.metrics if "/" not in m),
        metrics={k: v for k, v in report.metrics.items() if math.isfinite(v)},
        intervals=intervals(task, docs, report, protocol, seed=seed),
        n=report.n,
        n_unparsed=report.n_unparsed,
        excluded=report.excluded,
        notes=report.notes,
        metric_n=report.metric_n,
    )


def question_of(task: Benchmark, doc: Mapping[str, Any], protocol: str) -> str:
    """The prompt; the bare question where a document scored from files lacks what the prompt shows.

    A run refuses such a document before it asks anything.
    """
    try:
        return task.prompt(doc, protocol)
    except UserError:
        return str(doc.get("question", ""))


def samples_text(samples: Sequence[Sample]) -> str:
    """The lines of samples_TASK.jsonl."""
    return "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples)


def record_text(record: Mapping[str, Any]) -> str:
    """The text of record.json: plain JSON, no NaN."""
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_timing(value: Any) -> Any:
    """A record, or a part of one, without its `TIMING_FIELDS`: what a rerun must repeat exactly."""
    if isinstance(value, Mapping):
        return {k: without_timing(v) for k, v in value.items() if k not in TIMING_FIELDS}
    return [without_timing(v) for v in value] if isinstance(value, list) else value


def result_entry(result: TaskResult) -> dict[str, Any]:
    """A task's part of the record."""
    metrics = {}
    for name, value in result.metrics.items():
        interval = result.intervals.get(name)
        metrics[name] = {"value": value} | _interval_entry(interval)
        if result.metric_n.get(name, result.n) != result.n:
            metrics[name]["n"] = result.metric_n[name]
    return {
        "n": result.n,
        "n_unparsed": result.n_unparsed,
        "excluded": result.excluded,
        "unit": result.unit,
        "metrics": metrics,
        "notes": result.notes,
    }


def _interval_entry(interval: Interval | NoInterval | None) -> dict[str, Any]:
    """low, high, method; or no_interval: why."""
    if isinstance(interval, NoInterval):
        return {"no_interval": interval.reason}
    return asdict(interval) if interval else {}


def environment() -> dict[str, Any]:
    """Commit, code digest, packages and machine."""
    return {
        "commit": commit(),
        "code_sha256": code_sha256(),
        "packages": packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def packages() -> dict[str, str]:
    """Versions of the installed packages that scores depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    """The source tree's commit, "-dirty" when files differ from it; None where it is no git tree.

    An installed package may lie inside somebody's repository: its commit says nothing of ours.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        sha = _git("rev-parse", "HEAD")
        return sha + "-dirty" if _git("status", "--porcelain", "--untracked-files=no") else sha
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
