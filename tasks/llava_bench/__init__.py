"""LLaVA-Bench (in the wild): 60 open requests about 24 images (Liu et al., 2023).

A judge model rates a reference answer of text-only GPT-4 and the model's answer. Without one
(`--judge URL`) there is no score.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tasks.common import Benchmark, Case, Doc, Hub, PerProtocol, Report, lmms_eval_functions
from tasks.judged import JudgeModel
from tasks.llava_bench import published
from tasks.llava_bench.judging import review_answers

CATEGORIES = ("conv", "detail", "complex")


class LlavaBench(Benchmark):
    """The answers' mean rating over the references', overall and by category."""

    name = "llava_bench"
    size = "60 questions on 24 images"
    primary_metric = "score"
    metrics = ("score",)
    columns = ("question_id", "question", "category")
    layout = published.layout
    judged = True
    demo = False
    hub = Hub("lmms-lab/llava-bench-in-the-wild", split="train")
    cluster_columns = ("image_id", "question_id")
    token_limits = PerProtocol(paper=1024, lmms=4096)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("ASSISTANT:",))

    def prompt(self, doc: Doc, protocol: str) -> str:
        return doc["question"]

    def reference(self, doc: Doc) -> str | None:
        """GPT-4's answer, which is rated beside the model's."""
        answer = doc.get("gpt_answer")
        return answer if isinstance(answer, str) and answer.strip() else None

    def maximum(self, metric: str, metrics: Iterable[str]) -> float:
        """An answer may be rated above its reference: 10 beside 1."""
        return 10.0

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        """The answer alone: its score needs a judge."""
        return Case(None, prediction.strip() or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        """Ratios of mean ratings; nothing where no answer is rated."""
        rated = [
            (doc["category"], case.detail["ratings"])
            for doc, case in zip(docs, cases, strict=True)
            if case.detail is not None
        ]
        metrics = {"score": _ratio([ratings for _, ratings in rated])}
        for category in CATEGORIES:
            own = [ratings for its_category, ratings in rated if its_category == category]
            metrics[f"{category}/score"] = _ratio(own)
        return {metric: value for metric, value in metrics.items() if value is not None}

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        return ["answers are not rated: LLaVA-Bench needs a judge model (--judge URL)"]

    def evaluate_judged(
        self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str, judge: JudgeModel
    ) -> Report:
        """Every answer rated by the judge beside its reference."""
        return review_answers(self, docs, predictions, protocol, judge)


def _ratio(ratings: Sequence[Any]) -> float | None:
    """Mean rating of the answers over that of the references; None where there is none."""
    reference = sum(pair[0] for pair in ratings)
    return sum(pair[1] for pair in ratings) / reference if reference else None


task = LlavaBench()
globals().update(lmms_eval_functions(task))
