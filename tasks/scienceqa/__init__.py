"""ScienceQA: school science questions with two to five choices (Lu et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from statistics import fmean
from string import ascii_uppercase

from tasks.common import (
    Benchmark,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    lmms_eval_functions,
)
from tasks.official import Metric, Official, letter
from tasks.published import Row
from tasks.scienceqa import answers, published, scorer
from tasks.scienceqa.prompt import choice_question


class ScienceQa(Benchmark):
    """Accuracy on the questions that have an image (the headline), and on all questions."""

    name = "scienceqa"
    size = "4,241 questions"
    paper_column = PaperColumn(3, "SQA-I")
    primary_metric = "accuracy"
    primary_metric_needs_image = True
    text_only_questions = True
    metrics = ("accuracy", "accuracy_all")
    unanswered_wrong_in = "accuracy_all"
    columns = ("question", "choices", "answer", "hint")
    prompt_options = ("hint",)
    list_columns = ("choices",)
    layout = published.layout
    llava = answers.llava
    upload = answers.upload
    hub = Hub("lmms-lab/ScienceQA", name="ScienceQA-FULL", split="test")
    official = Official(
        "scienceqa/scienceqa.yaml",
        {
            "accuracy": Metric("exact_match", rows=lambda given: given.with_image),
            "accuracy_all": Metric("exact_match"),
        },
        reading=letter,
    )
    token_limits = PerProtocol(paper=1024, lmms=16)

    def prompt(self, doc: Doc, protocol: str) -> str:
        hint = doc["hint"] if self.prompt_choice("hint", protocol) == "shown" else None
        return choice_question(hint, doc["question"], doc["choices"], protocol)

    def asked(self, doc: Doc) -> list[str]:
        letters = zip(ascii_uppercase, doc["choices"], strict=False)
        return super().asked(doc) + [f"{letter}. {text}" for letter, text in letters]

    def reference(self, doc: Doc) -> str | None:
        """The right choice's letter; None where `answer` is not the index of a choice."""
        answer, choices = doc["answer"], doc["choices"]
        if isinstance(answer, str) and answer.isdecimal():  # as a table has it
            answer = int(answer)
        if not isinstance(answer, Integral) or not isinstance(choices, list | tuple):
            return None
        return scorer.LETTERS[int(answer)] if 0 <= int(answer) < min(len(choices), 5) else None

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        return {
            row: "no reference: answer is not the index of a choice"
            for row, doc in enumerate(docs)
            if self.reference(doc) is None
        }

    def vlmevalkit(self, row: Row) -> list[Row]:
        return answers.from_vlmevalkit(row)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        read = scorer.read_paper if protocol == "paper" else scorer.read_lmms
        letter = read(prediction)
        return Case(float(letter == self.reference(doc)), letter)

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        everything = [case.score or 0.0 for case in cases]
        told = [self.has_image(doc) for doc in docs]
        images = [score for score, image in zip(everything, told, strict=True) if image]
        subset = {"accuracy": fmean(images)} if images and None not in told else {}
        return subset | {"accuracy_all": fmean(everything)}

    def metric_n(self, docs: Sequence[Doc]) -> dict[str, int]:
        return {"accuracy": sum(bool(self.has_image(doc)) for doc in docs)}

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        told = [self.has_image(doc) for doc in docs]
        if None in told:
            return [
                f"{told.count(None)} of {len(told)} rows do not tell whether they have an image: "
                "accuracy (the image subset) is not reported; give rows the column has_image "
                "(true or false), or image (empty for a text-only question)"
            ]
        images = told.count(True)
        if not images:
            return ["no question has an image: accuracy (the image subset) is not reported"]
        if images == len(docs):
            return ["every question has an image: accuracy_all covers the image subset alone"]
        return [f"accuracy covers the {images} questions with an image, accuracy_all {len(docs)}"]


task = ScienceQa()
globals().update(lmms_eval_functions(task))
