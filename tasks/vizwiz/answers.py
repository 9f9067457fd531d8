"""LLaVA's answers to VizWiz joined with its documents, which are known by their photos."""

from __future__ import annotations

from tasks.answer_files import Documents, Key, LlavaAnswers, TruthFiles, add
from tasks.published import Row
from vlmamba_core.errors import UserError


def photo(name: object) -> str:
    """A photo's name without its suffix; the hub's rows and the published files differ in that."""
    return str(name).removesuffix(".jpg")


def join(truth: TruthFiles) -> Documents:
    """By the photo, which a question_id names itself or by its number in LLaVA's question file.

    The number is what scripts/convert_vizwiz_for_submission.py of LLaVA joins by.
    """
    documents: dict[Key, Row] = {}
    for row in truth.documents():
        add(documents, (photo(row["question_id"]),), row)
    photos = _numbered(truth)

    def key_of(answer: Row) -> Key:
        name = str(answer["question_id"])
        return (photo(photos.get(name, name)),)

    return Documents(documents, key_of)


def _numbered(truth: TruthFiles) -> dict[str, str]:
    """question_id -> photo, of the question files among --truth."""
    photos: dict[str, str] = {}
    for path in truth.paths:
        for row in truth.rows(path) if path.suffix in (".json", ".jsonl") else ():
            if row.keys() >= {"question_id", "image", "text"}:
                name, image = str(row["question_id"]), str(row["image"])
                if photos.setdefault(name, image) != image:
                    raise UserError(f"vizwiz: --truth has two photos for question {name!r}")
    return photos


llava = LlavaAnswers(
    truth="llava_test.jsonl, VizWiz's own val.json, or documents in hub columns", join=join
)
