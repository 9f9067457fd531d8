"""MM-Vet's own mm-vet.json and images/, and the grades that mm-vet_evaluator.py writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tasks.published import Layout, Row, find_files, only, read_json, records_of


def _find(folder: Path, split: str) -> list[Path]:
    return only(find_files(folder, "mm-vet.json"))


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    rows: list[Row] = []
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not records_of(content, "question", "capability"):
            return None
        rows += [
            {
                "question_id": name,
                "question": row["question"],
                "answer": row.get("answer"),
                "capability": row["capability"],
                "image": row.get("imagename"),
            }
            for name, row in content.items()
        ]
    return rows


def grades(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Question id -> grade (mean over the runs) and grader, from mm-vet_evaluator.py's file.

    Raises ValueError for a grade outside 0..1.
    """
    found = {}
    for name, row in content.items():
        grade = fmean(row["score"])
        if not 0.0 <= grade <= 1.0:
            raise ValueError(f"question {name} has grade {grade}")
        found[name] = {"grade": grade, "grader": ", ".join(sorted(set(row["model"])))}
    return found


layout = Layout("mm-vet.json", _find, _read)
