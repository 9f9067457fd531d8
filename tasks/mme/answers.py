"""LLaVA's and VLMEvalKit's answers to MME joined with its documents."""

from __future__ import annotations

from pathlib import Path

from tasks.answer_files import Documents, Key, LlavaAnswers, TruthFiles, add
from tasks.common import SHORT_ANSWER
from tasks.mme.prompt import YES_OR_NO
from tasks.published import Row


def join(truth: TruthFiles) -> Documents:
    """A question is known by subtask, image name without suffix, and its text."""
    documents: dict[Key, Row] = {}
    texts = all(path.suffix == ".txt" for path in truth.paths)
    rows = truth.documents() if texts else [r for path in truth.paths for r in truth.rows(path)]
    for row in rows:
        image = row.get("question_id") or f"{row['category']}/{row['image']}"
        kept = {column: row[column] for column in ("question", "answer", "category")}
        add(documents, _key(image, row["question"]), {"question_id": image, **kept})
    return Documents(documents, lambda one: _key(str(one["question_id"]), one["prompt"]))


def _key(image: str, question: str) -> Key:
    bare = question.replace(SHORT_ANSWER, "").replace(YES_OR_NO.strip(), "").strip()
    return (image.split("/")[0], Path(image).stem, bare)


def from_vlmevalkit(row: Row) -> list[Row]:
    """Its rows name the image by its path."""
    kept = {column: row[column] for column in ("question", "answer", "category")}
    return [{"question_id": row["image_path"], **kept}]


llava = LlavaAnswers(
    truth="rows with category, question, answer, and image or question_id", join=join
)
