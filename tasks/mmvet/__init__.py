"""MM-Vet: open requests that need several abilities at once (Yu et al., 2023).

Answers are graded by a language model. Without one (`--judge URL`) there is no score; the
submission file for the benchmark's online judge can be written all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from tasks.common import (
    Benchmark,
    Case,
    Doc,
    Hub,
    PaperColumn,
    PerProtocol,
    Report,
    lmms_eval_functions,
)
from tasks.judged import JudgeModel
from tasks.mmvet import answers, published
from tasks.mmvet.judging import grade_answers, rubric
from tasks.published import Row

ABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer to the "
    "following question: \n\n"
)


class MMVet(Benchmark):
    """Mean grade of the answers, overall and for the questions that need each ability."""

    name = "mmvet"
    size = "218 questions on 200 images"
    paper_column = PaperColumn(8, "MM-Vet")
    primary_metric = "score"
    metrics = ("score",)
    columns = ("question_id", "question")
    list_columns = ("capability",)
    text_lists = True  # "rec,ocr", as its own files and the hub's have it
    layout = published.layout
    llava = answers.llava
    answer_formats = answers.formats
    judged = True
    hub = Hub("lmms-lab/MMVet", split="test")
    cluster_columns = ("question_id",)
    token_limits = PerProtocol(paper=1024, lmms=1024)
    submission_suffix = ".json"

    def prompt(self, doc: Doc, protocol: str) -> str:
        return doc["question"] if protocol == "paper" else STEP_BY_STEP + doc["question"]

    def reference(self, doc: Doc) -> str | None:
        """The reference answer, in which <AND> and <OR> join elements."""
        answer = doc.get("answer")
        return answer if isinstance(answer, str) and answer.strip() else None

    def vlmevalkit(self, row: Row) -> list[Row]:
        return answers.from_vlmevalkit(row)

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        """The answer with the grade that the document brings along, if any."""
        grade = doc.get("grade")
        answer = prediction.strip() or None
        return Case(None, answer) if grade is None else Case(grade, answer or f"graded {grade:g}")

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        """Means of the grades there are; nothing where no answer is graded."""
        graded = [
            (_abilities(doc), case.score)
            for doc, case in zip(docs, cases, strict=True)
            if case.score is not None
        ]
        if not graded:
            return {}
        metrics = {"score": fmean(score for _, score in graded)}
        for ability in ABILITIES:
            scores = [score for needed, score in graded if ability in needed]
            if scores:
                metrics[f"{ability}/score"] = fmean(scores)
        return metrics

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        graders = sorted({doc["grader"] for doc in docs if doc.get("grade") is not None})
        if graders:
            return [f"grades as published, by {', '.join(graders)}"]
        return ["answers are not graded: MM-Vet needs a judge model (--judge URL)"]

    def judge_prompt(self, doc: Doc, prediction: str, protocol: str) -> str:
        """What the judge model is asked about one answer (its reference must be known)."""
        truth = str(self.reference(doc)).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        row = f"{doc['question']} | {truth} | {prediction} |"
        # The two evaluators differ in the space that follows the last bar.
        return f"{rubric(protocol)}\n{row}{' ' if protocol == 'paper' else ''}"

    def evaluate_judged(
        self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str, judge: JudgeModel
    ) -> Report:
        """Every answer graded by the judge."""
        return grade_answers(self, docs, predictions, protocol, judge, self.judge_prompt)

    def submission_id(self, doc: Doc) -> str:
        """The number of the question after "v1_", which the hub's rows have and LLaVA's lack."""
        return f"v1_{str(super().submission_id(doc)).removeprefix('v1_')}"

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> dict[str, str]:
        """{question id: answer}, the object that the online judge takes; ids read v1_0, v1_1..."""
        return {
            self.submission_id(doc): prediction.strip()
            for doc, prediction in zip(docs, predictions, strict=True)
        }


def _abilities(doc: Doc) -> set[str]:
    """The abilities that a question needs: "rec,ocr", or a list of names."""
    needed = doc.get("capability")
    if isinstance(needed, str):
        return {name.strip() for name in needed.split(",")}
    return set() if needed is None or isinstance(needed, float) else set(needed)


task = MMVet()
globals().update(lmms_eval_functions(task))
