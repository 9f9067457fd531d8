"""The single answers of some runs for the report's browser: questions, answers, small pictures.

Questions of several runs are the same where task, row, image and reference agree.  Pictures come
from the run's own data source; one whose content is not what the run saw is not shown.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tasks
from harness.data.images import UnreadableImage, decode, image_key
from harness.data.questions import NO_IMAGE
from harness.runs.schema import Sample
from harness.runs.store import NAMED, EvaluationRun
from vlmamba_core.errors import UserError

THUMBNAIL_PX = 264  # twice the size shown
JPEG_QUALITY = 72
TEXT_ONLY = "text only"


@dataclass
class Browser:
    """What the page's script reads; `notes` say what is missing and why."""

    runs: list[str]
    tasks: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)  # content key -> data address
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """JSON that may stand in a <script>: no "<", no ">", no "&", plain ASCII."""
        content = {"runs": self.runs, "tasks": self.tasks, "images": self.images}
        text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        for mark in "<>&":  # "</script>" would end the element; the others could open a comment
            text = text.replace(mark, f"\\u{ord(mark):04x}")
        return text


def collect(runs: Sequence[EvaluationRun], max_samples: int, max_images: int) -> Browser:
    """At most `max_samples` questions a task, and `max_images` pictures a task."""
    browser = Browser([run.marked for run in runs])
    for task in dict.fromkeys(name for run in runs for name in run.tasks):
        answers = [{_identity(s): s for s in run.samples(task)} for run in runs]
        questions = list(dict.fromkeys(key for found in answers for key in found))
        kept = questions[:max_samples]
        images = _thumbnails(task, runs, answers, kept, max_images, browser.notes)
        browser.images |= images
        browser.tasks.append(
            {
                "name": task,
                "leftOut": len(questions) - len(kept),
                "questions": [_question(key, answers, images) for key in kept],
            }
        )
    return browser


Identity = tuple[int, str | None, str]


def _identity(sample: Sample) -> Identity:
    return sample.doc_id, sample.image, json.dumps(sample.reference, sort_keys=True)


def _question(
    key: Identity, answers: Sequence[Mapping[Identity, Sample]], images: Mapping[str, str]
) -> dict[str, Any]:
    found = [by_key.get(key) for by_key in answers]
    first = next(sample for sample in found if sample is not None)
    return {
        "id": f"row {first.doc_id + 1}",
        "question": first.question,
        "reference": _reference_text(first.reference),
        "image": first.image if first.image in images else None,
        "imageNote": _why_no_image(first),
        "answers": [None if sample is None else _answer(sample) for sample in found],
    }


def _answer(sample: Sample) -> dict[str, Any]:
    return {
        "prediction": sample.prediction,
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
    return "unreadable image" if sample.excluded == "unreadable image" else TEXT_ONLY


def _thumbnails(
    task: str,
    runs: Sequence[EvaluationRun],
    answers: Sequence[Mapping[Identity, Sample]],
    questions: Iterable[Identity],
    limit: int,
    notes: list[str],
) -> dict[str, str]:
    """Content key -> picture, of the first run whose data can still be read."""
    wanted = {
        key[1]: key[0]
        for key in reversed(list(questions))
        if key[1] is not None and not key[1].startswith(NAMED)
    }
    if not wanted or limit < 1:
        return {}
    for run, found in zip(runs, answers, strict=True):
        if not found:
            continue
        try:
            source, benchmark = run.source(), tasks.load(task)
            source.check(benchmark)
            rows = source.load(benchmark, str(run.record["protocol"]))
        except UserError as error:
            notes.append(f"{task}: no images, the data of {run.name} cannot be read: {error}")
            continue
        return _from_rows(rows, benchmark.image_cells, wanted, limit)
    return {}


def _from_rows(
    rows: Any, cells: Callable[[Mapping], list], wanted: Mapping[str, int], limit: int
) -> dict[str, str]:
    """Key -> thumbnail of a row's first image."""
    pictures: dict[str, str] = {}
    for key, row in sorted(wanted.items(), key=lambda entry: entry[1]):
        if len(pictures) == limit:
            break
        images = cells(rows[row]) if row < len(rows) else []
        try:
            if images and None not in images and "+".join(map(image_key, images)) == key:
                pictures[key] = thumbnail(images[0])
        except UnreadableImage:
            continue
    return pictures


def thumbnail(value: Any) -> str:
    """A stored image as a small JPEG in a data address. Raises UnreadableImage."""
    image = decode(value).convert("RGB")
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
