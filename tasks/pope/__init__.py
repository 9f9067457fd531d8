"""POPE: does a model see objects that are not there? (Li et al., 2023)"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.common import (
    Benchmark,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    lmms_eval_functions,
)
from tasks.official import Metric, Official, word
from tasks.pope import answers, published, scorer
from tasks.pope.prompt import short_question
from tasks.published import Row

CATEGORIES = ("random", "popular", "adversarial")


class Pope(Benchmark):
    """Yes/no questions about objects, in three categories of how the absent ones were drawn."""

    name = "pope"
    size = "9,000 questions on 500 images"
    paper_column = PaperColumn(5, "POPE")
    primary_metric = "f1"
    metrics = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    columns = ("question", "answer", "category")
    layout = published.layout
    llava = answers.llava
    upload = answers.upload
    hub = Hub("lmms-lab/POPE", split="test")
    official = Official(
        "pope/pope.yaml",
        {
            "f1": Metric("pope_f1_score", mean_of_categories=True),
            "accuracy": Metric("pope_accuracy"),
            "precision": Metric("pope_precision"),
            "recall": Metric("pope_recall"),
            "yes_ratio": Metric("pope_yes_ratio", only_lmms=True),
        },
        prepare=lambda row: {"question_id": "", **row},
        reading=word,
    )
    token_limits = PerProtocol(paper=128, lmms=128)

    def prompt(self, doc: Doc, protocol: str) -> str:
        return short_question(doc["question"])

    def reference(self, doc: Doc) -> str | None:
        """ "yes", "no", or None where the column holds something else."""
        answer = str(doc["answer"]).strip().lower()
        return answer if answer in ("yes", "no") else None

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        reasons = {}
        for row, doc in enumerate(docs):
            if not isinstance(doc["category"], str):
                reasons[row] = "no category"
            elif self.reference(doc) is None:
                reasons[row] = "no reference: answer is neither yes nor no"
        return reasons

    def vlmevalkit(self, row: Row) -> list[Row]:
        return answers.from_vlmevalkit(row)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        read = scorer.read_paper if protocol == "paper" else scorer.read_lmms
        label = read(prediction)
        return Case(float(label == self.reference(doc)), label)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        kinds = (self.kind(doc, case) for doc, case in zip(docs, cases, strict=True))
        return self.aggregate_kinds(Counter(kinds), protocol)

    def kind(self, doc: Doc, case: Case) -> tuple[str, str | None, str | None]:
        return doc["category"], self.reference(doc), case.parsed

    def aggregate_kinds(self, counts: Mapping[Any, int], protocol: str) -> dict[str, float]:
        by_category: dict[str, scorer.Counts] = defaultdict(Counter)
        for (category, truth, parsed), count in counts.items():
            by_category[category][truth, parsed] = count
        return scorer.summarize(by_category, protocol)

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        absent = [c for c in CATEGORIES if c not in {doc["category"] for doc in docs}]
        return [f"categories absent from the answered rows: {', '.join(absent)}"] if absent else []


task = Pope()
globals().update(lmms_eval_functions(task))
