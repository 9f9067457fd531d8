"""LLaVA-Bench's own questions.jsonl, context.jsonl and answers_gpt4.jsonl, and images/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.published import Layout, Row, entries, find_files, only, read_json
from vlmamba_core.errors import UserError

NAMES = ("context.jsonl", "answers_gpt4.jsonl")


def _find(folder: Path, split: str) -> list[Path]:
    """Its three files, which lie in one folder: the names alone could be others'."""
    own = [p for p in find_files(folder, "questions.jsonl") if (p.with_name(NAMES[0])).is_file()]
    return [path for first in only(own) for path in (first, *map(first.with_name, NAMES))]


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    contents = [read_json(path) for path in paths if path.is_file()]
    questions = next((found for c in contents if (found := entries(c, "category", "image"))), None)
    contexts = next((found for c in contents if (found := entries(c, "caption", "image"))), None)
    if questions is None or contexts is None:
        return None
    answers = next((c for c in contents if entries(c, "text") and not entries(c, "image")), None)
    if answers is None:
        raise UserError(f"llava_bench: {paths[0].name} needs answers_gpt4.jsonl beside it")
    captions = {row["image"]: row["caption"] for row in contexts}
    references = {row["question_id"]: row["text"] for row in entries(answers, "text") or ()}
    return [
        {
            "question_id": row["question_id"],
            "question": row["text"],
            "category": row["category"],
            "caption": captions.get(row["image"]),
            "gpt_answer": references.get(row["question_id"]),
            "image_id": row["image"],
            "image": row["image"],
        }
        for row in questions
    ]


layout = Layout("questions.jsonl, context.jsonl and answers_gpt4.jsonl", _find, _read)
