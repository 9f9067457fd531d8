"""GQA: compositional questions about real scenes, one answer each (Hudson and Manning, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tasks.common import SHORT_ANSWER, Benchmark, Case, Doc, Hub, lmms_eval_functions
from tasks.exact_match import comparable, missing_answers, parse
from tasks.gqa.images import hub_image


class GQA(Benchmark):
    """Exact match on the balanced questions of testdev."""

    name = "gqa"
    headline = "accuracy"
    metrics = ("accuracy",)
    columns = ("question", "answer")
    hub = Hub("lmms-lab/GQA", name="testdev_balanced_instructions", split="testdev")
    image_hub = Hub("lmms-lab/GQA", name="testdev_balanced_images", split="testdev")

    def prompt(self, doc: Doc, protocol: str) -> str:
        return f"{doc['question']}\n{SHORT_ANSWER}"

    def max_new_tokens(self, protocol: str) -> int:
        return 128 if protocol == "paper" else 16

    def stop(self, protocol: str) -> tuple[str, ...]:
        return ("\n\n",) if protocol == "lmms" else ()

    def images(self, doc: Doc) -> list:
        """The row's own image; else the one its imageId names in the hub's image table."""
        return super().images(doc) or [hub_image(self.image_hub, doc["imageId"])]

    def cluster(self, doc: Doc) -> str:
        image_id = doc.get("imageId")
        return super().cluster(doc) if image_id is None else str(image_id)

    def truth(self, doc: Doc) -> str | None:
        return None if missing_answers([doc]) else doc["answer"]

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        reasons = missing_answers(docs)
        if protocol == "paper":  # the official script reads the accuracy off balanced questions
            unbalanced = (row for row, doc in enumerate(docs) if doc.get("isBalanced") is False)
            reasons |= dict.fromkeys(unbalanced, "not in the balanced set")
        return reasons

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        answer = parse(prediction, protocol)
        truth = self.truth(doc)
        right = None if truth is None else float(answer == comparable(truth, protocol))
        return Case(right, answer or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        return {"accuracy": fmean(case.score or 0.0 for case in cases)}


task = GQA()
globals().update(lmms_eval_functions(task))
