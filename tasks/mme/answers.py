"""LLaVA's and VLMEvalKit's answers to MME joined with its documents."""

from __future__ import annotations

from pathlib import Path

from tasks.answer_files import Documents, Key, LlavaAnswers, TruthFiles, Upload, add
from tasks.common import SHORT_ANSWER
from tasks.mme import scorer
from tasks.mme.prompt import YES_OR_NO
from tasks.published import Row
from vlmamba_core.errors import UserError


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


def results(path: Path) -> list[tuple[Row, str]] | None:
    """Documents and answers of the files that eval_tool/calculation.py takes, one a subtask.

    A line is image, question, Yes or No, answer, parted by tabs. None where there is no such file;
    raises UserError for one that is damaged.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.txt"))
    files = [file for file in files if file.suffix == ".txt" and file.stem in scorer.KNOWN]
    return [row for file in files for row in _lines(file)] or None


def _lines(file: Path) -> list[tuple[Row, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} as UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        if not line.strip():
            continue
        if len(cells) != 4:
            raise UserError(
                f"{file} line {number} has {len(cells)} cells; expected image, question, truth and "
                "answer, parted by tabs"
            )
        image, question, truth, answer = cells
        doc = {"question_id": f"{file.stem}/{image}", "question": question.strip()}
        rows.append((doc | {"answer": truth.strip(), "category": file.stem}, answer))
    return rows


upload = Upload(
    read=results, description="a <subtask>.txt as MME's eval_tool takes it, or a folder of these"
)
