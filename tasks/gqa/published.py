"""GQA's own questions JSON: question id -> question, imageId, answer; images/ID.jpg."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.published import Layout, Row, find_files, only, read_json, records_of


def _find(folder: Path, split: str) -> list[Path]:
    names = (f"{split}_balanced_questions.json", f"{split}_all_questions.json")
    return only(find_files(folder, *names))


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    rows: list[Row] = []
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not records_of(content, "question", "imageId"):
            return None
        for name, row in content.items():
            kept = {
                "id": name,
                "question_id": name,
                "imageId": row["imageId"],
                "question": row["question"],
                "answer": row.get("answer"),
                "image": f"{row['imageId']}.jpg",
            }
            rows.append(kept | ({"isBalanced": row["isBalanced"]} if "isBalanced" in row else {}))
    return rows


layout = Layout("*_balanced_questions.json", _find, _read)
