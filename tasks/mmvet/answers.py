"""LLaVA's and VLMEvalKit's answers to MM-Vet, and the grades of its own evaluator."""

from __future__ import annotations

from tasks.answer_files import AnswerFormat, LlavaAnswers
from tasks.mmvet.published import grades
from tasks.published import Row


def from_vlmevalkit(row: Row) -> list[Row]:
    """Its category is the abilities that a question needs."""
    kept = {column: row[column] for column in ("question", "answer")}
    return [{"question_id": row["index"], "capability": row["category"], **kept}]


def bare_id(identifier: object) -> str:
    """The number of a question: documents have "v1_" before it, answers do not."""
    return str(identifier).removeprefix("v1_")


llava = LlavaAnswers(identifier=bare_id)
GRADES = AnswerFormat("file of grades by mm-vet_evaluator.py", "mm-vet.json", grades)
formats = {"mmvet-grades": GRADES}
