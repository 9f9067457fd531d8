"""MMBench (dev, English): multiple choice, each question asked once per rotation of its options.

Rows of one question share `index` modulo 1,000,000; rotation k has k * 1,000,000 added. A
question counts as right only when every rotation is (circular evaluation, Liu et al., 2023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any

from tasks.common import Benchmark, Case, Doc, Hub, PerProtocol, lmms_eval_functions
from tasks.errors import UserError
from tasks.mmbench import scorer
from tasks.mmbench.prompt import is_empty, lmms_question, paper_question

ROTATION = 1_000_000


class MmBench(Benchmark):
    """Circular accuracy (the headline), vanilla accuracy (unrotated rows), and by L2 category."""

    name = "mmbench"
    headline = "accuracy"
    metrics = ("accuracy", "vanilla_accuracy")
    columns = ("index", "question", "A", "B")
    hub = Hub("lmms-lab/MMBench", name="en", split="dev")
    token_limits = PerProtocol(paper=1024, lmms=1024)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("ASSISTANT:",))
    submission_suffix = ".xlsx"

    def prompt(self, doc: Doc, protocol: str) -> str:
        return paper_question(doc) if protocol == "paper" else lmms_question(doc)

    def options(self, doc: Doc) -> dict[str, str]:
        """Letter -> text of the options that are not empty."""
        return {c: str(doc[c]) for c in ascii_uppercase if c in doc and not is_empty(doc[c])}

    def truth(self, doc: Doc) -> str | None:
        """The right option's letter; None on the test split, where it is hidden."""
        answer = doc.get("answer")
        return answer if isinstance(answer, str) and answer in self.options(doc) else None

    def cluster(self, doc: Doc) -> str:
        """The question: its rotations belong together."""
        return str(_index(doc) % ROTATION)

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        """Rows without truth, and every row of a question whose rotations are not all there.

        Data without any rotated row have vanilla accuracy alone, so nothing is excluded then.
        """
        reasons = {
            row: "no truth: answer is not the letter of an option"
            for row, doc in enumerate(docs)
            if self.truth(doc) is None
        }
        if not any(map(_is_rotated, docs)):
            return reasons
        questions: dict[str, list[int]] = defaultdict(list)
        for row, doc in enumerate(docs):
            if row not in reasons:
                questions[self.cluster(doc)].append(row)
        for rows in questions.values():
            n_options = max(len(self.options(docs[row])) for row in rows)
            problem = _incomplete([_index(docs[row]) for row in rows], n_options)
            if problem:
                reasons |= dict.fromkeys(rows, problem)
        return reasons

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> list[dict[str, Any]]:
        """One row a question and rotation: index, question, options, prediction."""
        letters = [c for c in "ABCDE" if any(c in self.options(doc) for doc in docs)]
        return [
            {"index": _index(doc), "question": doc["question"]}
            | {letter: self.options(doc).get(letter) for letter in letters}
            | {"prediction": prediction}
            for doc, prediction in zip(docs, predictions, strict=True)
        ]

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        if protocol == "paper":
            letter = scorer.read_paper(prediction, self.options(doc))
        else:
            letter = scorer.read_lmms(prediction, _options_lmms(doc))
        return Case(float(letter == self.truth(doc)), letter)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        rows = list(zip(docs, cases, strict=True))
        first = [(doc, case.score == 1) for doc, case in rows if not _is_rotated(doc)]
        vanilla = {"vanilla_accuracy": _share(right for _, right in first)} if first else {}
        if not any(map(_is_rotated, docs)):
            return vanilla
        wrong = {self.cluster(doc) for doc, case in rows if case.score != 1}
        right = [(_l2_category(doc), self.cluster(doc) not in wrong) for doc, _ in first]
        by_category = {
            f"{category}/accuracy": _share(hit for c, hit in right if c == category)
            for category in dict.fromkeys(c for c, _ in right if c is not None)
        }
        return {"accuracy": _share(hit for _, hit in right)} | vanilla | by_category

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        if any(map(_is_rotated, docs)):
            return []
        return ["no answered row is a rotation: circular accuracy is not reported"]


def _index(doc: Doc) -> int:
    try:
        return int(doc["index"])
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"mmbench: index {doc['index']!r} is not a whole number") from None


def _is_rotated(doc: Doc) -> bool:
    return _index(doc) >= ROTATION


def _incomplete(indices: list[int], n_options: int) -> str | None:
    """What keeps a question's rows from being all its rotations, each once; None if nothing."""
    if len(set(indices)) < len(indices):
        return "a rotation of the question comes twice"
    if len(indices) < n_options or min(indices) >= ROTATION:
        return f"question has {len(indices)} scorable rotation(s) of its {n_options} options"
    return None


def _l2_category(doc: Doc) -> str | None:
    """The column's name differs between the hub copy and the published TSV."""
    category = doc.get("L2-category", doc.get("l2-category"))
    return None if is_empty(category) else str(category)


def _options_lmms(doc: Doc) -> dict[str, str]:
    """The options as lmms-eval builds them: A-D, and an absent column is the text "nan"."""
    cells = {letter: doc.get(letter, "nan") for letter in "ABCD"}
    return {c: str(cell) for c, cell in cells.items() if cell is not None and cell == cell}


def _share(hits: Iterable[bool]) -> float:
    marks = list(hits)
    return sum(marks) / len(marks)


task = MmBench()
globals().update(lmms_eval_functions(task))
