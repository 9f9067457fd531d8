"""VizWiz-VQA: questions that blind people asked about their own photos (Gurari et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tasks import vqa_answers
from tasks.answer_files import Upload
from tasks.common import SHORT_ANSWER, Case, Doc, Hub, PerProtocol, lmms_eval_functions
from tasks.official import EXACT_MATCH, Official
from tasks.textvqa.scorer import score as m4c_score
from tasks.vizwiz import answers, published
from tasks.vizwiz.published import IF_UNANSWERABLE


class VizWiz(vqa_answers.HumanAnswers):
    """Accuracy of short answers against ten people's, overall and by type of answer.

    VizWiz's own evaluation normalizes the answer (which LLaVA has put through the M4C normalizer),
    but not the people's; lmms-eval puts both through the M4C normalizer.
    """

    name = "vizwiz"
    size = "4,319 questions"
    metrics = ("accuracy",)
    columns = ("question_id", "question", "answers")
    list_columns = ("answers",)
    layout = published.layout
    llava = answers.llava
    upload = Upload("image")
    demo = False
    unanswered_refused = True
    hub = Hub("lmms-lab/VizWiz-VQA", split="val")
    official = Official("vizwiz_vqa/vizwiz_vqa_val.yaml", EXACT_MATCH)
    cluster_columns = ("question_id",)  # one question a photo
    token_limits = PerProtocol(paper=128, lmms=1024)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("ASSISTANT:",))
    submission_suffix = ".json"

    def prompt(self, doc: Doc, protocol: str) -> str:
        question = doc["question"] if protocol == "paper" else doc["question"].capitalize()
        return f"{question}\n{IF_UNANSWERABLE}\n{SHORT_ANSWER}"

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        answer = self.to_submit(prediction)
        people = vqa_answers.references(doc)
        if people is None:
            return Case(None, answer or None)
        if protocol == "lmms":
            return Case(m4c_score(answer, people), answer or None)
        compared = vqa_answers.normalize(answer)
        return Case(vqa_answers.soft_accuracy(compared, people), compared or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for doc, case in zip(docs, cases, strict=True):
            kind = doc.get("category")
            if isinstance(kind, str) and kind:
                scores.setdefault(f"{kind}/accuracy", []).append(case.score or 0.0)
        overall = {"accuracy": fmean(case.score or 0.0 for case in cases)}
        return overall | {metric: fmean(values) for metric, values in scores.items()}

    def means_over(self, doc: Doc) -> tuple[str, ...]:
        kind = doc.get("category")
        named = isinstance(kind, str) and kind
        return ("accuracy", f"{kind}/accuracy") if named else ("accuracy",)

    def submission_id(self, doc: Doc) -> str:
        """The photo's file name, with or without which the rows name a question."""
        return f"{answers.photo(super().submission_id(doc))}.jpg"

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> list[dict[str, Any]]:
        """The list of {image, answer} that the test server takes.

        As scripts/convert_vizwiz_for_submission.py of LLaVA and lmms-eval's vizwiz_vqa_test write
        it.
        """
        return [
            {"image": self.submission_id(doc), "answer": self.to_submit(prediction)}
            for doc, prediction in zip(docs, predictions, strict=True)
        ]


task = VizWiz()
globals().update(lmms_eval_functions(task))
