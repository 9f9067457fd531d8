"""ScienceQA's own files: problems.json, pid_splits.json and images/SPLIT/ID/image.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.published import Layout, Row, is_of, one_of_each, read_json, records_of
from vlmamba_core.errors import UserError

NAMES = {"validation": "val"}


def _find(folder: Path, split: str) -> list[Path]:
    return one_of_each(folder, "problems.json", "pid_splits.json")


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    contents = [read_json(path) for path in paths]
    splits = [c for c in contents if is_of(c, "train", "test")]
    problems = [c for c in contents if c not in splits]
    if len(problems) != 1 or not isinstance(problems[0], dict):
        return None
    if not records_of(problems[0], "question", "choices", "answer"):
        return None
    name = NAMES.get(split, split)
    rows = problems[0]
    if splits:
        if name not in splits[0]:
            known = ", ".join(splits[0])
            raise UserError(f"scienceqa: pid_splits.json has no split {name!r} (it has: {known})")
        if absent := [pid for pid in splits[0][name] if pid not in rows]:
            raise UserError(
                f"scienceqa: {len(absent)} of {len(splits[0][name])} problems of split {name} are "
                f"not in problems.json, such as {absent[0]!r}"
            )
        rows = {pid: rows[pid] for pid in splits[0][name]}
    else:
        rows = {pid: row for pid, row in rows.items() if row.get("split", name) == name}
    return [
        {
            "question_id": pid,
            "question": row["question"],
            "choices": row["choices"],
            "answer": row["answer"],
            "hint": row.get("hint", ""),
            "has_image": bool(row.get("image")),
            "image": f"{row.get('split', name)}/{pid}/{row['image']}" if row.get("image") else None,
        }
        for pid, row in rows.items()
    ]


layout = Layout("problems.json with pid_splits.json", _find, _read)
