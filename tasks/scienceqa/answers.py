"""LLaVA's and VLMEvalKit's answers to ScienceQA joined with its documents."""

from __future__ import annotations

from string import ascii_uppercase

from tasks.answer_files import Documents, Key, LlavaAnswers, TruthFiles, add, by_question_id
from tasks.common import OPTION_LETTER
from tasks.published import Row, read_json


def join(truth: TruthFiles) -> Documents:
    """By the problem's id, from its own files or from LLaVA's question file."""
    documents: dict[Key, Row] = {}
    problems = truth.published()
    for row in problems or ():
        kept = {column: value for column, value in row.items() if column != "image"}
        add(documents, (row["question_id"],), kept)
    for row in () if problems else (row for path in truth.paths for row in read_json(path)):
        add(documents, (str(row["id"]),), _conversation(row))
    return Documents(documents, by_question_id)


def _conversation(row: Row) -> Row:
    """The document of an entry of LLaVA's question file, where the prompt is one text."""
    asked, answered = (turn["value"] for turn in row["conversations"][:2])
    question, choices = split_choices(asked.removeprefix("<image>\n"))
    return {
        "question": question,
        "choices": choices,
        "answer": ascii_uppercase.index(answered),
        "hint": "",
        "has_image": "image" in row,
    }


def split_choices(text: str) -> tuple[str, list[str]]:
    """The question and the choices of a block that ends "\\nA. one\\nB. two".

    A choice may have several lines. Without choices the whole block is the question.
    """
    lines = text.removesuffix(f"\n{OPTION_LETTER}").split("\n")
    start = max((i for i, line in enumerate(lines) if line.startswith("A. ")), default=len(lines))
    choices: list[str] = []
    for line in lines[start:]:
        mark = f"{ascii_uppercase[len(choices)]}. "
        if line.startswith(mark):
            choices.append(line.removeprefix(mark))
        else:
            choices[-1] += f"\n{line}"
    return "\n".join(lines[:start]), choices


def from_vlmevalkit(row: Row) -> list[Row]:
    """Its sets are the image subset."""
    choices = [row[letter] for letter in ascii_uppercase if row.get(letter)]
    return [
        {
            "question": row["question"],
            "choices": choices,
            "answer": ascii_uppercase.index(row["answer"]),
            "hint": row.get("hint", ""),
            "has_image": True,
        }
    ]


llava = LlavaAnswers(truth="problems.json, or the question file with conversations", join=join)
