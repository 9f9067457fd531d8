"""COCO's own captions JSON: captions_val2014.json or captions_val2017.json, and the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.published import Layout, Row, find_files, is_of, only, read_json
from vlmamba_core.errors import UserError


def _find(folder: Path, split: str) -> list[Path]:
    found = find_files(folder, f"captions_{split}.json", f"captions_{split}20*.json")
    if len({path.name for path in found}) > 1:
        names = ", ".join(sorted({path.name for path in found}))
        raise UserError(f"{folder} has {names}; name the one to use, such as --split val2014")
    return only(found)


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    rows: dict[int, Row] = {}
    for path in paths:
        content = read_json(path)
        if not is_of(content, "images", "annotations"):
            return None
        for image in content["images"]:
            rows[image["id"]] = {
                "question_id": image["file_name"],
                "id": image["id"],
                "answer": [],
                "image": image["file_name"],
            }
        for annotation in content["annotations"]:
            rows[annotation["image_id"]]["answer"].append(annotation["caption"])
    return list(rows.values())


layout = Layout("captions_val2014.json or captions_val2017.json", _find, _read)
