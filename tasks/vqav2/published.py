"""VQAv2's own files (visualqa.org): questions JSON, annotations JSON, COCO's image folders.

Test splits have questions only; `test` images serve `testdev` too.  LLaVA's own question file
(llava_vqav2_mscoco_test-dev2015.jsonl) is read as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.common import SHORT_ANSWER
from tasks.published import Layout, Row, entries, find_files, is_of, one_of_each, only, read_json
from vlmamba_core.errors import UserError

SUBSETS = {"train": "train2014", "validation": "val2014", "val": "val2014"}
SUBSETS |= {"testdev": "test-dev2015", "test": "test2015"}


def _find(folder: Path, split: str) -> list[Path]:
    subset = SUBSETS.get(split, split)
    official = one_of_each(
        folder,
        f"v2_OpenEnded_mscoco_{subset}_questions.json",
        f"v2_mscoco_{subset}_annotations.json",
    )
    return official or only(find_files(folder, f"llava_vqav2_mscoco_{subset}.jsonl"))


def _read(paths: Sequence[Path], split: str) -> list[Row] | None:
    contents = [read_json(path) for path in paths]
    llava = [entries(content, "question_id", "image", "text") for content in contents]
    if all(llava):
        return [_llava_row(row) for rows in llava for row in rows or ()]
    questions = [c for c in contents if is_of(c, "questions")]
    annotations = [c for c in contents if is_of(c, "annotations")]
    if len(questions) + len(annotations) != len(contents) or not contents:
        return None
    if not questions:
        raise UserError("vqav2: the annotations need the questions JSON of the same split beside")
    subsets = {content.get("data_subtype", "") for content in questions}
    if not annotations and any(not subset.startswith("test") for subset in subsets):
        raise UserError(f"vqav2: {paths[0].name} needs its v2_mscoco_*_annotations.json beside it")
    truth = {row["question_id"]: row for content in annotations for row in content["annotations"]}
    rows = []
    for content in questions:
        for row in content["questions"]:
            known = truth.get(row["question_id"])
            if annotations and known is None:
                raise UserError(f"vqav2: question {row['question_id']} has no annotation")
            rows.append(_row(row, known, content.get("data_subtype", "")))
    return rows


def _llava_row(row: Row) -> Row:
    return {
        "question_id": row["question_id"],
        "question": row["text"].removesuffix(f"\n{SHORT_ANSWER}"),
        "answers": None,
        "answer_type": "other",
        "image": row["image"],
    }


def _row(question: Row, truth: Row | None, subset: str) -> Row:
    subset = subset.replace("test-dev", "test")
    number = question["image_id"]
    return {
        "question_id": question["question_id"],
        "image_id": number,
        "question": question["question"],
        "answers": truth["answers"] if truth else None,
        "answer_type": truth["answer_type"] if truth else "other",
        "image": f"COCO_{subset}_{int(number):012d}.jpg",
    }


layout = Layout(
    "v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json", _find, _read
)
