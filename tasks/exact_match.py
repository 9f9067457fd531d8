"""Exact match of one short answer, as LLaVA with GQA's script and as lmms-eval decide it."""

from __future__ import annotations

import string
from collections.abc import Sequence
from statistics import fmean

from tasks.common import SHORT_ANSWER, Benchmark, Case, Doc, PerProtocol

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def parse(prediction: str, protocol: str) -> str:
    """The answer as compared.

    `paper`: stripped, trailing full stops removed, lower case (LLaVA's convert_gqa_for_eval.py).
    `lmms`: lower case without ASCII punctuation (lmms-eval's exact_match metric).
    """
    if protocol == "paper":
        return prediction.strip().rstrip(".").lower()
    return _lower_without_punctuation(prediction.strip())


def comparable(reference: str, protocol: str) -> str:
    """The reference as compared: as it stands under `paper`, treated like answers under `lmms`."""
    return reference if protocol == "paper" else _lower_without_punctuation(reference)


def _lower_without_punctuation(text: str) -> str:
    # lmms-eval holds texts in numpy: lower case cannot get longer, trailing NULs are not kept.
    lower = text.rstrip("\0").lower()[: len(text)]
    return lower.translate(NO_PUNCTUATION).rstrip("\0")


class ExactMatch(Benchmark):
    """A benchmark of short answers with one reference each, right or wrong."""

    primary_metric = "accuracy"
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] = ("question", "answer")
    token_limits = PerProtocol(paper=128, lmms=16)

    def prompt(self, doc: Doc, protocol: str) -> str:
        return f"{doc['question']}\n{SHORT_ANSWER}"

    def reference(self, doc: Doc) -> str | None:
        """The reference; None where it is hidden, empty or not text."""
        answer = doc["answer"]
        return answer if isinstance(answer, str) and answer.strip() else None

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        return {
            row: "no reference answer"
            for row, doc in enumerate(docs)
            if self.reference(doc) is None
        }

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        as_it_is = self.submitted and protocol == "paper"  # GQA's own script compares it so
        answer = prediction if as_it_is else parse(prediction, protocol)
        truth = self.reference(doc)
        right = None if truth is None else float(answer == comparable(truth, protocol))
        return Case(right, answer or None)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        return {"accuracy": fmean(case.score or 0.0 for case in cases)}

    def means_over(self, doc: Doc) -> tuple[str, ...]:
        return ("accuracy",)
