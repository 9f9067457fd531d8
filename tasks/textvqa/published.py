"""TextVQA's own JSON (TextVQA_0.5.1_*.json) and its OCR tokens, which are another file.

The tokens come from TextVQA_Rosetta_OCR_*.json, or from LLaVA's question file
(llava_textvqa_val_v051_ocr.jsonl), whose prompts hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.published import Layout, Row, entries, is_of, one_of_each, read_json, records_of
from tasks.textvqa.prompt import OCR_LINE

NAMES = {"validation": "val"}


def _find(folder: Path, split: str) -> list[Path]:
    name = NAMES.get(split, split)
    found = one_of_each(folder, f"TextVQA_0.5.1_{name}.json", f"TextVQA_Rosetta_OCR_*{name}.json")
    if len(found) == 1:
        found = one_of_each(folder, found[0].name, f"llava_textvqa_{name}_*ocr.jsonl")
    return found


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    rows: list[Row] = []
    tokens: dict[str, Any] = {}
    for path in paths:
        content = read_json(path)
        if asked := entries(content, "question_id", "image", "text"):
            tokens |= {row["question_id"]: _tokens_of(row["text"]) for row in asked}
        elif not is_of(content, "data"):
            return None
        elif records_of(content["data"], "question", "image_id"):
            rows += content["data"]
        elif records_of(content["data"], "image_id", "ocr_tokens"):
            tokens |= {row["image_id"]: row["ocr_tokens"] for row in content["data"]}
        else:
            return None
    return [_row(row, tokens) for row in rows] or None


def _tokens_of(text: str) -> list[str]:
    """The tokens in a prompt of LLaVA's; it joins them with a comma, which they may hold too."""
    line = next((line for line in text.split("\n") if line.startswith(OCR_LINE)), OCR_LINE)
    listed = line.removeprefix(OCR_LINE)
    return listed.split(", ") if listed else []


def _row(row: Row, tokens: dict[str, Any]) -> Row:
    kept = {
        "question_id": row["question_id"],
        "image_id": row["image_id"],
        "question": row["question"],
        "answers": row.get("answers"),
        "image": f"{row['image_id']}.jpg",
    }
    return kept | ({"ocr_tokens": tokens.get(row["image_id"])} if tokens else {})


layout = Layout("TextVQA_0.5.1_*.json (with TextVQA_Rosetta_OCR_*.json)", _find, _read)
