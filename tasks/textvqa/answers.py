"""LLaVA's and VLMEvalKit's answers to TextVQA joined with its documents."""

from __future__ import annotations

import re

from tasks.answer_files import LlavaAnswers, Upload
from tasks.cells import read_list
from tasks.published import Row
from tasks.textvqa.prompt import OCR_LINE

OCR_FIRST = "OCR tokens: "  # starts the prompts of older models
OLDER_QUESTION = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_in(prompt: str) -> str:
    """The question of a prompt, which the OCR tokens may stand before.

    The forms are those that prompt_processor of llava/eval/eval_textvqa.py reads.
    """
    if prompt.startswith(OCR_FIRST) and (found := OLDER_QUESTION.search(prompt)):
        return found[1]
    lines = prompt.split("\n")
    return lines[prompt.startswith(OCR_LINE) and len(lines) > 1]


def from_vlmevalkit(row: Row) -> list[Row]:
    """Its cells hold the ten answers as a written list; raises ValueError for anything else."""
    if (answers := read_list(row["answer"])) is None:
        raise ValueError("answer is no list")
    return [{"question_id": row["index"], "question": row["question"], "answers": answers}]


llava = LlavaAnswers(id_column="image_id", question_in=question_in)
upload = Upload(join=LlavaAnswers())  # by question_id, LLaVA's answers by the image's
