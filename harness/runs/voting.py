"""Test-time scaling: several sampled answers to a question and their majority (InternVL 2.5).

    voted = Voted.of(asked, evaluation.ask(model, [asked], "paper", votes=16)[0], 16)
    voted.chosen("paper")                  # one answer a question
    voted.curves("paper")                  # metric -> its value for k = 1 to 16

Votes are counted by what the benchmark reads in an answer, not by its wording; of readings named
equally often the one named first wins.  Every k is computed from the same samples: of k votes,
those of k - 1 and one more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.data.questions import OwnRows
from harness.models.resumable import Resumable
from harness.runs.evaluation import Asked
from harness.runs.schema import record_text
from tasks.common import Benchmark, Doc, stored
from vlmamba_core.folder import RunFolder

Votes = Sequence[str] | None  # of one question; None: its image could not be read


def majority(task: Benchmark, doc: Doc, votes: Sequence[str], protocol: str) -> str:
    """The first answer of the most frequent reading; one without a reading reads as itself."""
    return _majorities(task, doc, votes, protocol)[-1]


def _majorities(task: Benchmark, doc: Doc, votes: Sequence[str], protocol: str) -> list[str]:
    """The majority of the first k votes for k = 1 to all; every answer is read once."""
    first: dict[tuple[bool, str], str] = {}  # reading -> its first answer, in order of appearance
    counts: Counter[tuple[bool, str]] = Counter()
    chosen = []
    for answer in votes:
        reading = _reading(task, doc, answer, protocol)
        first.setdefault(reading, answer)
        counts[reading] += 1
        chosen.append(first[max(first, key=lambda one: counts[one])])
    return chosen


def _reading(task: Benchmark, doc: Doc, answer: str, protocol: str) -> tuple[bool, str]:
    try:
        parsed = task.score_case(doc, stored(answer), protocol).parsed
    except Exception:
        if not isinstance(task, OwnRows):
            raise
        parsed = None  # another library's code; it fails again, and is counted, where it scores
    return (False, stored(answer)) if parsed is None else (True, parsed)


def majorities(
    task: Benchmark, docs: Sequence[Doc], votes: Sequence[Votes], protocol: str
) -> list[Votes]:
    """Of each question the majority for every k; of rows that cannot be scored the first vote."""
    left_out = task.exclude(docs, protocol)
    chosen: list[Votes] = []
    for row, (doc, found) in enumerate(zip(docs, votes, strict=True)):
        if found is None:
            chosen.append(None)
        elif row in left_out:
            chosen.append([found[0]] * len(found))
        else:
            chosen.append(_majorities(task, doc, found, protocol))
    return chosen


def accuracy(
    task: Benchmark, docs: Sequence[Doc], votes: Sequence[Votes], protocol: str
) -> dict[str, list[float]]:
    """Each overall metric for k = 1 to as many votes as there are; empty where none is made."""
    answered = [
        (doc, chosen)
        for doc, chosen in zip(docs, majorities(task, docs, votes, protocol), strict=True)
        if chosen is not None
    ]
    documents = [doc for doc, _ in answered]
    curves: dict[str, list[float]] = {}
    for answers in zip(*(chosen for _, chosen in answered), strict=True):  # a tuple for each k
        for metric, value in task.evaluate(documents, answers, protocol).metrics.items():
            if "/" not in metric:
                curves.setdefault(metric, []).append(value)
    return curves


@dataclass(frozen=True)
class Voted:
    """A benchmark's documents, and the votes on each question."""

    task: Benchmark
    docs: Sequence[Doc]
    votes: Sequence[Votes]

    @classmethod
    def of(cls, asked: Asked, answers: Sequence[str | None], votes: int) -> Voted:
        """From answers that stand `votes` to a question, one after the other."""
        groups = [answers[first : first + votes] for first in range(0, len(answers), votes)]
        found = [None if None in g else [text for text in g if text is not None] for g in groups]
        return cls(asked.task, [question.doc for question in asked.questions], found)

    def chosen(self, protocol: str) -> list[str | None]:
        """The majority of all votes on each question."""
        by_number = majorities(self.task, self.docs, self.votes, protocol)
        return [None if found is None else found[-1] for found in by_number]

    def curves(self, protocol: str) -> dict[str, list[float]]:
        """See `accuracy`."""
        return accuracy(self.task, self.docs, self.votes, protocol)

    def text(self) -> str:
        """The lines of votes_TASK.jsonl: every question's answers, in the order they count in."""
        lines = ({"doc_id": row, "votes": found} for row, found in enumerate(self.votes))
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write(
    folder: RunFolder, record: dict[str, Any], model: Resumable, voted: Sequence[Voted]
) -> list[str]:
    """Add metrics by votes, and what a vote costs, to the record; lines for a person.

    Every answer goes to votes_TASK.jsonl.
    """
    votes = record["arguments"]["votes"]
    curves = {one.task.name: one.curves(record["protocol"]) for one in voted}
    record["votes"] = {name: dict(found) for name, found in curves.items()}
    record["cost"] |= cost(model, votes)
    for one in voted:
        folder.write(f"votes_{one.task.name}.jsonl", one.text())
    folder.write("record.json", record_text(record))
    lines = [line for name, found in curves.items() for line in say(name, found)]
    return [*lines, *filter(None, [say_cost(record["cost"], votes)])]


def cost(model: Resumable, votes: int) -> dict[str, float]:
    """Seconds of a question's prefill (its image's part included) and of each further vote.

    Empty for a model that does not tell its prefill apart, and where some answers were there
    already.
    """
    timing = model.timing
    questions = timing["questions"]
    if not questions or timing["resumed_answers"] or "prefill_s" not in timing:
        return {}
    once = timing["encode_s"] + timing["prefill_s"]
    return {
        "first_vote_s": (once + timing["decode_s"] / votes) / questions,
        "further_vote_s": timing["decode_s"] / votes / questions,
    }


def say(name: str, curves: Mapping[str, Sequence[float]]) -> list[str]:
    """Lines for a person: each metric for every k."""
    return [
        f"{name} {metric} by votes: {', '.join(f'{k}: {v:.4g}' for k, v in enumerate(values, 1))}"
        for metric, values in curves.items()
    ]


def say_cost(found: Mapping[str, float], votes: int) -> str:
    """One line on what votes cost; empty where nobody knows."""
    if "further_vote_s" not in found:
        return ""
    first, further = found["first_vote_s"], found["further_vote_s"]
    times = (first + (votes - 1) * further) / first
    return (
        f"a question: first vote {first:.3g} s, each further vote {further:.3g} s; "
        f"{votes} votes cost {times:.2f} times one"
    )
