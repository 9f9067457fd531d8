"""POPE's own label files: coco_pope_{random,popular,adversarial}.json, and COCO's val2014/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.published import Layout, Row, entries, find_files, only, read_json

CATEGORIES = ("random", "popular", "adversarial")


def _find(folder: Path, split: str) -> list[Path]:
    found = [only(find_files(folder, f"coco_pope_{category}.json")) for category in CATEGORIES]
    return [path for paths in found for path in paths]


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    rows: list[Row] = []
    for path in paths:
        category = next((name for name in CATEGORIES if name in path.stem), None)
        content = entries(read_json(path), "image", "text", "label")
        if category is None or content is None:
            return None
        rows += [
            {
                "question_id": str(row.get("question_id", number)),
                "question": row["text"],
                "answer": row["label"],
                "image_source": Path(row["image"]).stem,
                "category": category,
                "image": row["image"],
            }
            for number, row in enumerate(content, 1)
        ]
    return rows or None


layout = Layout(
    "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json", _find, _read
)
