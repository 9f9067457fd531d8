"""TextVQA: questions about text in photos, ten people's answers each (Singh et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tasks import vqa_answers
from tasks.common import Benchmark, Case, Doc, Hub, lmms_eval_functions
from tasks.textvqa import scorer
from tasks.textvqa.prompt import short_question


class TextVQA(Benchmark):
    """Accuracy of short answers against ten people's; `paper` shows the OCR tokens too."""

    name = "textvqa"
    headline = "accuracy"
    metrics = ("accuracy",)
    columns = ("question", "answers")
    hub = Hub("lmms-lab/textvqa", split="validation")

    def prompt(self, doc: Doc, protocol: str) -> str:
        return short_question(doc, with_ocr=protocol == "paper")

    def max_new_tokens(self, protocol: str) -> int:
        # lmms-eval sets no limit for this task; 1024 is what its LLaVA model then takes.
        return 128 if protocol == "paper" else 1024

    def stop(self, protocol: str) -> tuple[str, ...]:
        return ("ASSISTANT:",) if protocol == "lmms" else ()

    def cluster(self, doc: Doc) -> str:
        image_id = doc.get("image_id")
        return super().cluster(doc) if image_id is None else str(image_id)

    def truth(self, doc: Doc) -> list[str] | None:
        return vqa_answers.references(doc)

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        needed = vqa_answers.ANSWERS_PER_QUESTION if protocol == "paper" else None
        return vqa_answers.missing_references(docs, needed)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        answer = vqa_answers.m4c_normalise(prediction)
        people = vqa_answers.references(doc)
        return Case(None if people is None else scorer.score(answer, people), answer or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        return {"accuracy": fmean(case.score or 0.0 for case in cases)}


task = TextVQA()
globals().update(lmms_eval_functions(task))
