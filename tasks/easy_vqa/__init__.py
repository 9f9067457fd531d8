"""easy-VQA: questions about one coloured shape, 13 possible answers (Zhou, 2019).

A real public set that ships inside a Python package, so it runs on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tasks.common import SHORT_ANSWER, Benchmark, Case, Doc, Hub, lmms_eval_functions
from tasks.exact_match import comparable, missing_answers, parse


class EasyVQA(Benchmark):
    """Exact match by the rules that GQA has under each protocol."""

    name = "easy_vqa"
    headline = "accuracy"
    metrics = ("accuracy",)
    columns = ("question", "answer")
    hub = Hub("easy-vqa", split="test")

    def prompt(self, doc: Doc, protocol: str) -> str:
        return f"{doc['question']}\n{SHORT_ANSWER}"

    def max_new_tokens(self, protocol: str) -> int:
        return 128 if protocol == "paper" else 16

    def stop(self, protocol: str) -> tuple[str, ...]:
        return ("\n\n",) if protocol == "lmms" else ()

    def cluster(self, doc: Doc) -> str:
        image_id = doc.get("image_id")
        return super().cluster(doc) if image_id is None else str(image_id)

    def truth(self, doc: Doc) -> str | None:
        return None if missing_answers([doc]) else doc["answer"]

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        return missing_answers(docs)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        answer = parse(prediction, protocol)
        truth = self.truth(doc)
        right = None if truth is None else float(answer == comparable(truth, protocol))
        return Case(right, answer or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        return {"accuracy": fmean(case.score or 0.0 for case in cases)}


task = EasyVQA()
globals().update(lmms_eval_functions(task))
