"""MME scoring: yes, no or other; per subtask accuracy, accuracy+ and score; two totals.

`paper` follows the official calculation.py on answers that LLaVA's convert_answer_to_mme.py
wrote, `lmms` follows lmms-eval's mme task. They read answers differently and count alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

SUBTASKS = {
    "perception": (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    "cognition": (
        "commonsense_reasoning",
        "numerical_calculation",
        "text_translation",
        "code_reasoning",
    ),
}
KNOWN = {subtask for group in SUBTASKS.values() for subtask in group}


def read_paper(answer: str) -> str | None:
    """ "yes" or "no" if the first four characters hold it (yes wins); None for "other".

    Nothing is stripped here, as in the official script, which four leading spaces would hide the
    answer from; `Benchmark.evaluate` and with it every command has stripped it before.
    """
    return _search(answer.lower()[:4])


def read_lmms(answer: str) -> str | None:
    """As `read_paper` after stripping spaces and every full stop; a lone "y" or "n" counts."""
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _search(text[:4])


def _search(start: str) -> str | None:
    return next((word for word in ("yes", "no") if word in start), None)


def subtask_scores(answers: Iterable[tuple[str, str, bool]]) -> dict[str, dict[str, float]]:
    """Scores of each subtask from (subtask, image key, correct) of every question.

    acc: fraction of questions right; acc_plus: fraction of images with both questions right;
    score: 100 * (acc + acc_plus), in points out of 200. An image drawn k times (bootstrap)
    brings 2k answers and counts as k images.
    """
    marks: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for subtask, image, correct in answers:
        marks[subtask][image].append(correct)
    return {subtask: _score(images) for subtask, images in marks.items()}


def _score(images: dict[str, list[bool]]) -> dict[str, float]:
    questions = sum(map(len, images.values()))
    acc = sum(map(sum, images.values())) / questions
    acc_plus = sum(len(marks) for marks in images.values() if all(marks)) / questions
    return {"acc": acc, "acc_plus": acc_plus, "score": 100 * acc + 100 * acc_plus}


def totals(by_subtask: dict[str, dict[str, float]]) -> dict[str, float]:
    """Perception and cognition: the sum of the scores of those subtasks that the data have.

    A total without any subtask is left out; it is not 0.
    """
    return {
        group: sum(by_subtask[name]["score"] for name in names if name in by_subtask)
        for group, names in SUBTASKS.items()
        if any(name in by_subtask for name in names)
    }
