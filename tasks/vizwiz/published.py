"""VizWiz's own val.json and test.json, photos beside; or LLaVA's llava_test.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.common import SHORT_ANSWER
from tasks.published import Layout, Row, entries, find_files, only, read_json

IF_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
NAMES = {"validation": "val"}
PHOTO = b"VizWiz_"  # every photo's name starts so; other data sets have a val.json too
BEGINNING = 4096  # bytes in which the first photo's name stands


def _find(folder: Path, split: str) -> list[Path]:
    name = NAMES.get(split, split)
    own = [path for path in find_files(folder, f"{name}.json") if _is_own(path)]
    return only(own) or only(find_files(folder, f"llava_{name}.jsonl"))


def _is_own(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return PHOTO in file.read(BEGINNING)
    except OSError:
        return False


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    """Rows of VizWiz's own files, then those of LLaVA's question files about other photos."""
    own: list[Row] = []
    asked: list[Row] = []
    for path in paths:
        content = read_json(path)
        official = entries(content, "image", "question")
        llava = None if official else entries(content, "image", "text")
        if official is None and llava is None:
            return None
        own += [_row(row, row["question"]) for row in official or ()]
        asked += [_row(row, _question(row["text"])) for row in llava or ()]
    photos = {row["image"] for row in own}
    return own + [row for row in asked if row["image"] not in photos]


def _question(prompt: str) -> str:
    return prompt.removesuffix(f"\n{SHORT_ANSWER}").removesuffix(f"\n{IF_UNANSWERABLE}")


def _row(row: Row, question: str) -> Row:
    people = row.get("answers")
    return {
        "question_id": Path(row["image"]).stem,
        "question": question,
        "answers": None if people is None else [person["answer"] for person in people],
        "category": row.get("answer_type"),
        "image": row["image"],
    }


layout = Layout("val.json or test.json of VizWiz, or llava_test.jsonl", _find, _read)
