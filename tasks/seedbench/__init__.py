"""SEED-Bench, image part: four-way multiple choice over nine abilities (Li et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tasks.answer_files import LlavaAnswers, Upload
from tasks.common import (
    OPTION_LETTER,
    Benchmark,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    lmms_eval_functions,
)
from tasks.official import Metric, Official, option
from tasks.seedbench import published

LETTERS = "ABCD"
ABILITIES = (  # by question_type_id, from 1; those of 10 and above are asked about videos
    "Scene Understanding",
    "Instance Identity",
    "Instance Attributes",
    "Instance Location",
    "Instances Counting",
    "Spatial Relation",
    "Instance Interaction",
    "Visual Reasoning",
    "Text Understanding",
)


class SeedBench(Benchmark):
    """Accuracy on the questions about images, overall and by ability."""

    name = "seedbench"
    size = "14,233 questions"
    primary_metric = "accuracy"
    metrics = ("accuracy",)
    unanswered_wrong_in = "accuracy"
    columns = ("question_id", "question", *(f"choice_{letter.lower()}" for letter in LETTERS))
    part = ("data_type", "image")
    layout = published.layout
    llava = LlavaAnswers(looked_up=True)  # convert_seed_for_submission.py
    upload = Upload(answer_key="prediction")
    demo = False
    hub = Hub("lmms-lab/SEED-Bench", split="test")
    official = Official(
        "seedbench/seedbench.yaml", {"accuracy": Metric("seed_image")}, reading=option
    )
    # the paper quotes figures that count questions about videos (BLIP-2's) beside some that do not
    paper_column = PaperColumn(10, "SEED", first_table_only=True, other="seed")
    cluster_columns = ("data_id", "question_id")
    token_limits = PerProtocol(paper=128, lmms=1024)
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("ASSISTANT:",))

    def prompt(self, doc: Doc, protocol: str) -> str:
        options = [f"{letter}. {text}" for letter, text in self.options(doc).items()]
        return "\n".join([doc["question"], *options, OPTION_LETTER])

    def options(self, doc: Doc) -> dict[str, str]:
        """Letter -> text."""
        return {letter: str(doc[f"choice_{letter.lower()}"]) for letter in LETTERS}

    def asked(self, doc: Doc) -> list[str]:
        return super().asked(doc) + [f"{c}. {text}" for c, text in self.options(doc).items()]

    def reference(self, doc: Doc) -> str | None:
        """The right option's letter; None where it is hidden."""
        answer = doc.get("answer")
        return answer if isinstance(answer, str) and answer in tuple(LETTERS) else None

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        reasons = {}
        for row, doc in enumerate(docs):
            if not self.asks(doc):
                reasons[row] = "not about an image"
            elif self.reference(doc) is None:
                reasons[row] = "no reference: answer is not the letter of an option"
        return reasons

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        """Under `paper` the answer has to be the letter, under `lmms` to start with it."""
        letter = prediction if protocol == "paper" else prediction[:1].upper()
        return Case(
            float(letter == self.reference(doc)), letter if letter in tuple(LETTERS) else None
        )

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for doc, case in zip(docs, cases, strict=True):
            if (ability := _ability(doc)) is not None:
                scores.setdefault(f"{ability}/accuracy", []).append(case.score or 0.0)
        overall = {"accuracy": fmean(case.score or 0.0 for case in cases)}
        return overall | {metric: fmean(values) for metric, values in scores.items()}

    def means_over(self, doc: Doc) -> tuple[str, ...]:
        ability = _ability(doc)
        return ("accuracy",) if ability is None else ("accuracy", f"{ability}/accuracy")


def _ability(doc: Doc) -> str | None:
    """The name of a question's ability; None where the row does not tell."""
    number = str(doc.get("question_type_id"))
    known = number.isdecimal() and number.isascii() and 1 <= int(number) <= len(ABILITIES)
    return ABILITIES[int(number) - 1] if known else None


task = SeedBench()
globals().update(lmms_eval_functions(task))
