"""MMBench (dev, English): multiple choice, each question asked once per rotation of its options.

Rows of one question share `index` modulo 1,000,000; rotation k has k * 1,000,000 added. A
question counts as right only when every rotation is (circular evaluation, Liu et al., 2023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any

from tasks.answer_files import LlavaAnswers, Upload
from tasks.common import (
    Benchmark,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    Report,
    lmms_eval_functions,
)
from tasks.judged import JudgeModel
from tasks.mmbench import scorer
from tasks.mmbench.judging import match_options
from tasks.mmbench.prompt import is_empty, lmms_question, paper_question
from tasks.official import Given, Metric, Official, Row, option
from vlmamba_core.errors import UserError

ROTATION = 1_000_000


def _unrotated(given: Given) -> bool:
    return int(given.row["index"]) < 1_000_000


def _official_row(row: Row) -> Row:
    described = dict.fromkeys(("hint", "source", "split", "category", "L2-category"), "")
    return {**described, **row, "index": int(row["index"])}  # a TSV's cells are text


class MmBench(Benchmark):
    """Circular accuracy (the headline), vanilla accuracy (unrotated rows), and by L2 category."""

    name = "mmbench"
    size = "4,329 rows of 1,164 questions"
    paper_column: PaperColumn | None = PaperColumn(7, "MMB")  # of this edition alone
    primary_metric = "accuracy"
    metrics = ("accuracy", "vanilla_accuracy")
    scored_alone = False
    columns = ("index", "question", "A", "B")
    empty_cell = "nan"
    prompt_options = ("hint",)
    llava = LlavaAnswers(id_column="index")
    upload = Upload("index", "prediction")
    judged = True
    hub = Hub("lmms-lab/MMBench", name="en", split="dev")
    official = Official(
        "mmbench/mmbench_en_dev_static.yaml",
        {
            "accuracy": Metric("gpt_eval_score"),
            "vanilla_accuracy": Metric("gpt_eval_score", rows=_unrotated),
        },
        scale=100.0,
        prepare=_official_row,
        reading=option,
    )
    token_limits = PerProtocol(paper=1024, lmms=1024)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("ASSISTANT:",))
    submission_suffix = ".xlsx"
    submission_column = "index"

    def prompt(self, doc: Doc, protocol: str) -> str:
        if self.prompt_choice("hint", protocol) == "none":
            doc = {**doc, "hint": None}
        return paper_question(doc) if protocol == "paper" else lmms_question(doc)

    def options(self, doc: Doc) -> dict[str, str]:
        """Letter -> text of the options that are not empty."""
        return {c: str(doc[c]) for c in ascii_uppercase if c in doc and not is_empty(doc[c])}

    def asked(self, doc: Doc) -> list[str]:
        return super().asked(doc) + [f"{c}. {text}" for c, text in self.options(doc).items()]

    def reference(self, doc: Doc) -> str | None:
        """The right option's letter; None on the test split, where it is hidden."""
        answer = doc.get("answer")
        return answer if isinstance(answer, str) and answer in self.options(doc) else None

    def cluster(self, doc: Doc) -> str:
        """The question: its rotations belong together."""
        return str(_index(doc) % ROTATION)

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        """Rows without truth and the rest of their questions; rows whose question has no first row.

        All rows that the data have belong to their question, as in the official code, which goes
        by the unrotated rows. Published questions need not have one rotation an option: a last
        option such as "All above are not right" stays in its place (53 of 1,176 in dev). What is
        truly missing, `notes` says.
        """
        reasons = {
            row: "no reference: answer is not the letter of an option"
            for row, doc in enumerate(docs)
            if self.reference(doc) is None
        }
        hidden = {self.cluster(docs[row]) for row in reasons if any(map(_is_rotated, docs))}
        asked = {self.cluster(doc) for doc in docs if not _is_rotated(doc)}
        for row, doc in enumerate(docs):
            if self.cluster(doc) not in asked:
                reasons.setdefault(row, "its question has no unrotated row")
            elif self.cluster(doc) in hidden:
                reasons.setdefault(row, "another rotation of its question has no reference")
        return reasons

    def evaluate_judged(
        self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str, judge: JudgeModel
    ) -> Report:
        """The judge says which option an answer means that the rules cannot read."""
        return match_options(self, docs, predictions, protocol, judge, self.options)

    def submission_id(self, doc: Doc) -> int:
        return _index(doc)

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
        return Case(float(letter == self.reference(doc)), letter)

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

    def metric_n(self, docs: Sequence[Doc]) -> dict[str, int]:
        """Questions, not rows."""
        n_questions = sum(not _is_rotated(doc) for doc in docs)
        return {"accuracy": n_questions, "vanilla_accuracy": n_questions}

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        if not any(map(_is_rotated, docs)):
            return ["no answered row is a rotation: circular accuracy is not reported"]
        notes = []
        missing = [n for rows in self._questions(docs) if (n := self._n_missing(rows)) > 0]
        if missing:
            notes.append(
                f"{len(missing)} questions lack {sum(missing)} of their rotations; each counts by "
                "the rows that are there, as in the official code"
            )
        repeats = len(docs) - len({_index(doc) for doc in docs})
        if repeats:
            notes.append(f"{repeats} rows have the index of an earlier row; each counts")
        return notes

    def _questions(self, docs: Sequence[Doc]) -> Iterable[list[Doc]]:
        """The rows of each question."""
        questions: dict[str, list[Doc]] = defaultdict(list)
        for doc in docs:
            questions[self.cluster(doc)].append(doc)
        return questions.values()

    def _n_missing(self, rows: Sequence[Doc]) -> int:
        """How many rotations a question lacks: one an option that moves, or that might have moved.

        An option that has the same letter in all rows, of two or more, never moves.
        """
        options = [self.options(row) for row in rows]
        fixed = [c for c, text in options[0].items() if all(o.get(c) == text for o in options)]
        n_rotations = len({_index(row) for row in rows})
        moving = len(options[0]) - (len(fixed) if n_rotations > 1 else 0)
        return moving - n_rotations


def _index(doc: Doc) -> int:
    try:
        return int(doc["index"])
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"mmbench: index {doc['index']!r} is not a whole number") from None


def _is_rotated(doc: Doc) -> bool:
    return _index(doc) >= ROTATION


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
