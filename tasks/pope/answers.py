"""LLaVA's and VLMEvalKit's answers to POPE joined with its documents."""

from __future__ import annotations

from pathlib import Path

from tasks.answer_files import Documents, Key, LlavaAnswers, TruthFiles, Upload, add, by_question_id
from tasks.common import SHORT_ANSWER
from tasks.pope.published import CATEGORIES
from tasks.published import Row
from vlmamba_core.errors import UserError

TRUTH = f"the question file and the label files of {', '.join(CATEGORIES)}, named after them"


def join(truth: TruthFiles) -> Documents:
    """The n-th question of a category in the question file has the n-th label of its file."""
    labels: dict[str, list[Row]] = {}
    questions: list[Row] = []
    documents: dict[Key, Row] = {}
    for path in truth.paths:
        rows = truth.rows(path)
        if "category" in rows[0]:
            questions += rows
        else:
            category = next(name for name in (*CATEGORIES, path.stem) if name in path.stem)
            if labels.setdefault(category, rows) is not rows:
                raise UserError(f"pope: --truth has two label files of category {category!r}")
    if labels and not questions:  # asked straight from one label file, by its own ids
        if len(labels) > 1:
            raise UserError(f"pope: ids repeat in the label files; --truth takes {TRUTH}")
        for document in truth.documents():
            add(documents, by_question_id(document), document)
    waiting = {category: iter(rows) for category, rows in labels.items()}
    for row in questions:
        label = next(waiting.get(row["category"], iter(())), None)
        add(documents, by_question_id(row), _document(row, label))
    return Documents(documents, by_question_id)


def _document(row: Row, label: Row | None) -> Row:
    question = row["text"].removesuffix(f"\n{SHORT_ANSWER}")
    if label is None or label["text"] != question:
        raise UserError(
            f"pope: question {row['question_id']} ({row['category']}, {question!r}) has no "
            f"label in its place; --truth takes {TRUTH}"
        )
    return {
        "question_id": str(row["question_id"]),
        "question": question,
        "answer": label["label"],
        "image_source": Path(row["image"]).stem,
        "category": row["category"],
    }


def from_vlmevalkit(row: Row) -> list[Row]:
    """Its file holds each question once, with all categories that ask it."""
    shared = {"question_id": row["index"], "question": row["question"], "answer": row["answer"]}
    image = {"image_source": Path(row.get("image_path") or row["index"]).stem}
    return [shared | image | {"category": category} for category in row["category"].split(",")]


llava = LlavaAnswers(truth=TRUTH, beside="llava_pope_test.jsonl", join=join)


def in_order(truth: TruthFiles) -> Documents:
    """The n-th answer is to the n-th document, and has its question."""
    documents: dict[Key, Row] = {
        (str(number), row["question"].strip()): row
        for number, row in enumerate(truth.documents(), 1)
    }
    return Documents(documents, lambda one: (str(one["question_id"]), one["prompt"].strip()))


# POPE's evaluate.py takes the answers of one category in the order of its label file.
upload = Upload(
    id_key="",
    question_key="question",
    join=LlavaAnswers(
        "the label file of the category, or of all in the answers' order", join=in_order
    ),
)
