"""TextVQA: questions about text in photos, ten people's answers each (Singh et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tasks import vqa_answers
from tasks.common import (
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    lmms_eval_functions,
)
from tasks.official import EXACT_MATCH, Official
from tasks.published import Row
from tasks.textvqa import answers, published, scorer
from tasks.textvqa.prompt import short_question


class TextVQA(vqa_answers.HumanAnswers):
    """Accuracy of short answers against ten people's; `paper` shows the OCR tokens too."""

    name = "textvqa"
    size = "5,000 questions on 3,166 images"
    paper_column = PaperColumn(4, "TextVQA")
    metrics = ("accuracy",)
    prompt_options = ("ocr",)
    columns = ("question", "answers")
    list_columns = ("answers", "ocr_tokens")
    layout = published.layout
    llava = answers.llava
    upload = answers.upload
    hub = Hub("lmms-lab/textvqa", split="validation")
    official = Official("textvqa/textvqa_val.yaml", EXACT_MATCH)
    # lmms-eval sets no limit for this task; 1024 is what its LLaVA model then takes.
    token_limits = PerProtocol(paper=128, lmms=1024)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("ASSISTANT:",))
    submission_suffix = ".json"

    def prompt(self, doc: Doc, protocol: str) -> str:
        return short_question(doc, self.prompt_choice("ocr", protocol))

    def vlmevalkit(self, row: Row) -> list[Row]:
        return answers.from_vlmevalkit(row)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        answer = vqa_answers.m4c_normalize(prediction)
        people = vqa_answers.references(doc)
        return Case(None if people is None else scorer.score(answer, people), answer or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        return {"accuracy": fmean(case.score or 0.0 for case in cases)}

    def means_over(self, doc: Doc) -> tuple[str, ...]:
        return ("accuracy",)

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> list[dict[str, Any]]:
        """The list of {question_id, answer} that the test server takes.

        The keys are those of `format_for_evalai` in mmf/datasets/builders/textvqa/dataset.py of
        facebookresearch/mmf. Answers go as they are: the server normalizes them, as scoring here
        does, and what was normalized twice may differ from what was normalized once.
        """
        return [
            {"question_id": self.submission_id(doc), "answer": prediction.strip()}
            for doc, prediction in zip(docs, predictions, strict=True)
        ]


task = TextVQA()
globals().update(lmms_eval_functions(task))
