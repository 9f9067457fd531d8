"""LLaVA's and VLMEvalKit's answers to ScienceQA joined with its documents."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from tasks.answer_files import (
    Documents,
    Key,
    LlavaAnswers,
    TruthFiles,
    Upload,
    add,
    by_question_id,
)
from tasks.common import OPTION_LETTER
from tasks.published import Row, is_of, read_json


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
        "answer": _place(answered),
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
            "answer": _place(row["answer"]),
            "hint": row.get("hint", ""),
            "has_image": True,
        }
    ]


llava = LlavaAnswers(truth="problems.json, or the question file with conversations", join=join)


def outputs(content: Any) -> Mapping[str, Any] | None:
    """The answers in eval_science_qa.py's --output-result; without them its choices as letters."""
    if is_of(content, "outputs") and isinstance(content["outputs"], Mapping):
        return content["outputs"]
    if not is_of(content, "results") or not isinstance(content["results"], Mapping):
        return None
    letters = dict(enumerate(ascii_uppercase[:5]))
    return {name: letters.get(place, "") for name, place in content["results"].items()}


upload = Upload(
    unwrap=outputs, description="what eval_science_qa.py writes as --output-result, or id -> answer"
)


def _place(letter: str) -> int:
    """Of an option; -1, which is none, for a cell without a letter."""
    return ascii_uppercase.index(letter) if len(letter) == 1 else -1
