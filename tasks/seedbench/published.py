"""SEED-Bench's own SEED-Bench.json, and SEED-Bench-image/ with files that have no suffix.

The JSON holds the questions about videos too, as the hub's table does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.published import Layout, Row, find_files, is_of, only, read_json, records_of


def _find(folder: Path, split: str) -> list[Path]:
    return only(find_files(folder, "SEED-Bench.json", "SEED-Bench_*.json"))


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    rows: list[Row] = []
    for path in paths:
        content = read_json(path)
        if not is_of(content, "questions"):
            return None
        if not records_of(content["questions"], "question", "choice_a", "question_id"):
            return None
        rows += [
            {key: value for key, value in row.items() if key != "segment"}
            | {"question_id": str(row["question_id"]), "image": row["data_id"]}
            for row in content["questions"]
        ]
    return rows


layout = Layout("SEED-Bench.json", _find, _read)
