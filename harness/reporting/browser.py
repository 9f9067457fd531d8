"""The single answers of some runs for the report's browser: questions, answers, pictures.

Questions of several runs are the same where task, row, image and reference agree.  Pictures come
from the run's own data source; one whose content is not what the run saw is not shown.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tasks
from harness.data.images import UnreadableImage, image_key
from harness.data.questions import NO_IMAGE
from harness.reporting.compare import asked_alike
from harness.reporting.pictures import Picture, Pictures
from harness.runs.schema import UNREADABLE, Sample
from harness.runs.store import NAMED, EvaluationRun
from vlmamba_core.errors import UserError

TEXT_ONLY = "text only"


@dataclass
class Browser:
    """What the page's script reads; `notes` say what is missing and why."""

    runs: list[str]
    tasks: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, Picture] = field(default_factory=dict)  # by content key
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None  # where large pictures are, if not all are inside

    def to_json(self) -> str:
        """JSON that may stand in a <script>: no "<", no ">", no "&", plain ASCII."""
        images = {key: picture.to_json() for key, picture in self.images.items()}
        content = {"runs": self.runs, "tasks": self.tasks, "images": images}
        text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        for mark in "<>&":  # "</script>" would end the element; the others could open a comment
            text = text.replace(mark, f"\\u{ord(mark):04x}")
        return text


def collect(
    runs: Sequence[EvaluationRun], max_samples: int, max_images: int, folder: Path | None = None
) -> Browser:
    """At most `max_samples` questions a task, and `max_images` pictures, shared by the tasks.

    folder: beside the page, for large pictures that do not fit into it; None: those are left out.
    """
    browser = Browser([run.marked for run in runs])
    pictures = Pictures(folder)
    found = {name: _Questions.of(name, runs, max_samples) for name in _tasks(runs)}
    shares = _shares({name: len(one.pictures()) for name, one in found.items()}, max_images)
    for name, one in found.items():
        _add_pictures(name, runs, one, pictures, shares[name], browser.notes)
        questions = [_question(key, one.answers, pictures) for key in one.kept]
        browser.tasks.append({"name": name, "leftOut": one.left_out, "questions": questions})
    browser.images = pictures.shown()
    browser.folder = folder if pictures.files else None
    return browser


Identity = tuple[int, str | None, str]


@dataclass(frozen=True)
class _Questions:
    """A task's questions that are kept, and each run's answers by question."""

    kept: Sequence[Identity]
    answers: Sequence[Mapping[Identity, Sample]]
    left_out: int

    @classmethod
    def of(cls, task: str, runs: Sequence[EvaluationRun], limit: int) -> _Questions:
        alike = all(asked_alike(runs[0], run, task) for run in runs)
        answers = [{_identity(s, alike): s for s in run.samples(task)} for run in runs]
        questions = list(dict.fromkeys(key for found in answers for key in found))
        return cls(questions[:limit], answers, max(0, len(questions) - limit))

    def pictures(self) -> dict[str, int]:
        """Content key -> the first row with it."""
        keys = ((key, row) for row, key, _ in reversed(self.kept) if key is not None)
        return {key: row for key, row in keys if not key.startswith((NAMED, NO_IMAGE))}


def _tasks(runs: Sequence[EvaluationRun]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.tasks))


def _shares(wanted: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many pictures each task may have: what it wants where that is no more than its part."""
    shares, left = {}, limit
    for place, name in enumerate(sorted(wanted, key=lambda name: wanted[name])):
        shares[name] = min(wanted[name], left // (len(wanted) - place))
        left -= shares[name]
    return shares


def _identity(sample: Sample, alike: bool) -> Identity:
    """alike: all runs put a question in the same words, so that other words are another one."""
    asked = [sample.reference, sample.question if alike else ""]
    return sample.doc_id, sample.image, json.dumps(asked, sort_keys=True)


def _question(
    key: Identity, answers: Sequence[Mapping[Identity, Sample]], images: Pictures
) -> dict[str, Any]:
    found = [by_key.get(key) for by_key in answers]
    first = next(sample for sample in found if sample is not None)
    return {
        "id": f"row {first.doc_id + 1}",
        "question": first.question,
        "reference": _reference_text(first.reference),
        "image": first.image if first.image and first.image in images else None,
        "imageNote": _why_no_image(first),
        "answers": [None if sample is None else _answer(sample) for sample in found],
    }


def _answer(sample: Sample) -> dict[str, Any]:
    return {
        "prediction": sample.prediction,
        "parsed": sample.parsed,
        "score": sample.score,
        "excluded": sample.excluded,
    }


def _reference_text(reference: Any) -> str | None:
    """Short: ten annotators' answers as a count of each."""
    if isinstance(reference, list) and all(isinstance(x, str) for x in reference):
        counts = {answer: reference.count(answer) for answer in reference}
        return ", ".join(a if n == 1 else f"{a} ({n})" for a, n in counts.items())
    return reference if reference is None or isinstance(reference, str) else json.dumps(reference)


def _why_no_image(sample: Sample) -> str:
    if sample.image not in (None, NO_IMAGE):
        return "image not included"
    return UNREADABLE if sample.excluded == UNREADABLE else TEXT_ONLY


def _add_pictures(
    task: str,
    runs: Sequence[EvaluationRun],
    questions: _Questions,
    pictures: Pictures,
    limit: int,
    notes: list[str],
) -> None:
    """Add at most `limit` pictures of the questions: of the first run whose data can be read."""
    wanted = {key: row for key, row in questions.pictures().items() if key not in pictures}
    if not wanted or limit < 1:
        return
    if task not in tasks.NAMES:
        notes.append(f"{task}: no images: its rows are read by another library's code")
        return
    for run, found in zip(runs, questions.answers, strict=True):
        if not found:
            continue
        try:
            source, benchmark = run.source(), tasks.load(task)
            protocol = str(run.record["protocol"])
            source.check(benchmark)
            rows = source.load(benchmark, protocol)
        except UserError as error:
            notes.append(f"{task}: no images, the data of {run.name} cannot be read: {error}")
            continue
        cells = functools.partial(benchmark.image_cells, protocol=protocol)
        _from_rows(rows, cells, wanted, pictures, limit)
        if len(wanted) > limit:
            notes.append(f"{task}: {limit} of {len(wanted)} pictures are shown (--max-images)")
        return


def _from_rows(
    rows: Any,
    cells: Callable[[Mapping], list],
    wanted: Mapping[str, int],
    pictures: Pictures,
    limit: int,
) -> None:
    """Add the first image of each wanted row, where it is the one that the run saw."""
    before = len(pictures)
    for key, row in sorted(wanted.items(), key=lambda entry: entry[1]):
        if len(pictures) - before == limit:
            break
        images = cells(rows[row]) if row < len(rows) else []
        try:
            if images and None not in images and "+".join(map(image_key, images)) == key:
                pictures.add(key, images[0])
        except UnreadableImage:
            continue
