"""VQAv2: open questions about photos, ten people's answers each (Goyal et al., 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tasks import vqa_answers
from tasks.common import (
    SHORT_ANSWER,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    lmms_eval_functions,
)
from tasks.official import EXACT_MATCH, Official
from tasks.vqav2 import published, scorer

ANSWER_TYPES = ("yes/no", "number", "other")


class VQAv2(vqa_answers.HumanAnswers):
    """Accuracy of short answers against ten people's, overall and by type of answer."""

    name = "vqav2"
    size = "214,354 questions on 40,504 images"
    paper_column = PaperColumn(1, "VQAv2")
    metrics = ("accuracy", *(f"{kind}/accuracy" for kind in ANSWER_TYPES))
    columns = ("question", "answers", "answer_type")
    list_columns = ("answers",)
    layout = published.layout
    unanswered_refused = True
    hub = Hub("lmms-lab/VQAv2", split="validation")
    official = Official("vqav2/vqav2_val.yaml", EXACT_MATCH)
    token_limits = PerProtocol(paper=128, lmms=16)
    submission_suffix = ".json"
    submission_split = "test"  # the server takes no file for test-dev alone

    def prompt(self, doc: Doc, protocol: str) -> str:
        return f"{doc['question']}\n{SHORT_ANSWER}"

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        people = vqa_answers.references(doc)
        if people is None:
            return Case(None, self.to_submit(prediction) or None)
        if protocol == "paper":
            answer, accuracy = scorer.paper_score(self.to_submit(prediction), people)
        else:
            answer, accuracy = scorer.lmms_score(prediction, people)
        return Case(accuracy, answer or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        rows = [
            (doc["answer_type"], case.score or 0.0) for doc, case in zip(docs, cases, strict=True)
        ]
        metrics = {"accuracy": fmean(score for _, score in rows)}
        for kind in ANSWER_TYPES:
            scores = [score for its_kind, score in rows if its_kind == kind]
            if scores:
                metrics[f"{kind}/accuracy"] = fmean(scores)
        return metrics

    def means_over(self, doc: Doc) -> tuple[str, ...]:
        kind = doc["answer_type"]
        return ("accuracy", f"{kind}/accuracy") if kind in ANSWER_TYPES else ("accuracy",)

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> list[dict[str, Any]]:
        """The list of {question_id, answer} that the test server takes.

        As scripts/convert_vqav2_for_submission.py of LLaVA writes it.
        """
        return [
            {
                "question_id": self.submission_id(doc),
                "answer": self.to_submit(prediction),
            }
            for doc, prediction in zip(docs, predictions, strict=True)
        ]


task = VQAv2()
globals().update(lmms_eval_functions(task))
