"""MMMU: college exam questions of thirty subjects, with up to seven images (Yue et al., 2024)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from tasks.answer_files import LlavaAnswers
from tasks.cells import read_list
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
from tasks.mmmu import scorer
from tasks.mmmu.prompt import choice_question, open_question
from tasks.official import Given, Metric, Official

CHOICE = "multiple-choice"
HIDDEN = "?"  # in place of every answer of the test split
IMAGE_NAME = re.compile(r"<image (\d+)>")
SUBJECT = re.compile(r"[^_]+_(.+)_\d+")  # of an id such as validation_Art_Theory_12
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
DOMAIN_OF = {subject: domain for domain, names in DOMAINS.items() for subject in names.split()}


def _no_choice(given: Given) -> str:
    """A wrong option for a question with options; the answer itself for an open one."""
    if given.row["question_type"] != "multiple-choice":
        return given.answer
    return "(B)" if given.row["answer"] == "A" else "(A)"


class Mmmu(Benchmark):
    """Accuracy over all questions, and by the six disciplines."""

    name = "mmmu"
    size = "900 questions"
    primary_metric = "accuracy"
    metrics = ("accuracy",)
    columns = ("id", "question", "options", "answer", "question_type")
    image_column = "image_1"
    more_image_columns = tuple(f"image_{number}" for number in range(2, 8))
    configs = tuple(sorted(DOMAIN_OF))
    demo = False
    llava = LlavaAnswers(id_column="id")
    hub = Hub("lmms-lab/MMMU", split="validation")
    official = Official(
        "mmmu/mmmu_val.yaml", {"accuracy": Metric("mmmu_acc")}, unread=_no_choice, digits=5
    )
    paper_column = PaperColumn(9, "MMMU", first_table_only=True)
    cluster_columns = ("id",)
    token_limits = PerProtocol(paper=128, lmms=128)
    submission_suffix = ".json"
    submission_column = "id"

    def prompt(self, doc: Doc, protocol: str) -> str:
        if doc["question_type"] == CHOICE:
            return choice_question(doc["question"], self.options(doc), protocol)
        return open_question(doc["question"], protocol)

    def options(self, doc: Doc) -> dict[str, str]:
        """Letter -> text; the hub's column is the list as Python writes it."""
        cell = doc["options"]
        listed = read_list(cell) if isinstance(cell, str) else cell
        texts = listed if isinstance(listed, list | tuple) else ()
        return dict(zip(ascii_uppercase, map(str, texts), strict=False))

    def asked(self, doc: Doc) -> list[str]:
        return super().asked(doc) + list(self.options(doc).values())

    def image_cells(self, doc: Doc, protocol: str) -> list:
        """Under `paper` the first one, as MMMU's script shows it whatever is named.

        Under `lmms` those that the question or its options name, by number; else the first one.
        """
        if protocol == "paper":
            return [doc.get(self.image_column)]
        named = IMAGE_NAME.findall("\n".join([doc["question"], *self.options(doc).values()]))
        columns = [f"image_{number}" for number in sorted(set(named))]
        return [doc.get(column) for column in columns or [self.image_column]]

    def reference(self, doc: Doc) -> str | list[str] | None:
        """The right option's letter, or what an open answer may be; None where it is hidden."""
        answer = doc["answer"]
        if doc["question_type"] == CHOICE:
            return answer if isinstance(answer, str) and answer in self.options(doc) else None
        accepted = _accepted(answer)
        if not accepted or accepted == [HIDDEN]:
            return None
        return accepted[0] if len(accepted) == 1 else accepted

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        return {
            row: "no reference answer"
            for row, doc in enumerate(docs)
            if self.reference(doc) is None
        }

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        if doc["question_type"] == CHOICE:
            options = self.options(doc)
            if self.submitted and protocol == "paper":  # main_eval_only.py takes it as it is
                letter = prediction if prediction in options else None
            else:
                letter = scorer.read_choice(prediction, options, protocol)
            return Case(float(letter is not None and letter == self.reference(doc)), letter)
        # lmms-eval takes a list of answers for one text, as the hub's column has it
        answer = doc["answer"]
        accepted = [answer] if protocol == "lmms" and isinstance(answer, str) else _accepted(answer)
        found = scorer.read_open(prediction)
        return Case(float(scorer.is_right(found, accepted)), prediction or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for doc, case in zip(docs, cases, strict=True):
            if domain := DOMAIN_OF.get(_subject(doc)):
                scores.setdefault(domain, []).append(case.score or 0.0)
        by_domain = {f"{d}/accuracy": fmean(scores[d]) for d in DOMAINS if d in scores}
        return {"accuracy": fmean(case.score or 0.0 for case in cases)} | by_domain

    def evaluate(self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str) -> Report:
        report = super().evaluate(docs, predictions, protocol)
        chances = [
            1 / len(self.options(doc))
            for doc, case in zip(docs, report.cases, strict=True)
            if case is not None and case.parsed is None and doc["question_type"] == CHOICE
        ]
        if not chances or self.submitted:
            return report
        drawn = report.metrics["accuracy"] + sum(chances) / report.n
        note = (
            f"{len(chances)} answers name no option; the official code draws one, with which "
            f"accuracy would be {drawn:.1%} on average"
        )
        return replace(report, notes=[*report.notes, note])

    def means_over(self, doc: Doc) -> tuple[str, ...]:
        domain = DOMAIN_OF.get(_subject(doc))
        return ("accuracy", f"{domain}/accuracy") if domain in DOMAINS else ("accuracy",)

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> dict[str, Any]:
        """{id: letter, or the open answer}, as MMMU's run_llava.py writes it for the server."""
        return {
            str(self.submission_id(doc)): self.score_case(doc, text.strip(), "paper").parsed or ""
            for doc, text in zip(docs, predictions, strict=True)
        }


def _accepted(answer: Any) -> list[str]:
    """The answers that count: one text, or a list of them that may be written as text."""
    if isinstance(answer, list | tuple):
        return [str(one) for one in answer]
    if not isinstance(answer, str) or not answer.strip():
        return []
    listed = read_list(answer) or ()
    texts = [one for one in listed if isinstance(one, str)]
    return texts if texts and len(texts) == len(listed) else [answer]


def _subject(doc: Doc) -> str:
    found = SUBJECT.fullmatch(str(doc["id"]))
    return found[1] if found else ""


task = Mmmu()
globals().update(lmms_eval_functions(task))
