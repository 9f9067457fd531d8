"""LLaVA's answers.jsonl (question_id, prompt, text), each answer joined with its document.

The truth of LLaVA's evaluation files stands elsewhere, in another shape for each benchmark
(see TRUTH_FILES); any benchmark without an entry there takes its documents in hub columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from harness.data.readers import Row, read_documents, read_json, read_published, read_rows
from tasks.common import OPTION_LETTER, SHORT_ANSWER, Benchmark
from tasks.mme.prompt import YES_OR_NO
from tasks.pope import CATEGORIES
from tasks.published import find_files, only
from tasks.textvqa.prompt import OCR_LINE
from vlmamba_core.errors import UserError

TRUTH_FILES = {
    "pope": f"the question file and the label files of {', '.join(CATEGORIES)}, named after them",
    "mme": "rows with category, question, answer, and image or question_id",
    "scienceqa": "problems.json, or the question file with conversations",
}
ID_COLUMNS = {"mmbench": "index", "gqa": "id", "textvqa": "image_id"}

# What reading a row of the wrong shape raises.
BAD_ROW = (AttributeError, IndexError, KeyError, TypeError, ValueError, SyntaxError, RecursionError)

Key = tuple[str, ...]
Documents = tuple[dict[Key, Row], Callable[[Row], Key]]  # and how an answer finds its document


class Joined(NamedTuple):
    """One answer with its document."""

    case_id: str
    doc: Row
    prediction: str
    row: int | None = None  # of the document in the truth; None: as in the answers
    image: str | None = None  # the key of its picture's content, where a run has noted it


def load(task: Benchmark, answers: Path, truth: Sequence[Path]) -> tuple[list[Joined], int]:
    """The answers in their own order, each with its document; and how many documents have none.

    Raises UserError for truth files that do not fit, an answer without a document, or two
    answers to one question.
    """
    published = f", or as published {task.layout.description}" if task.layout else ""
    wanted = TRUTH_FILES.get(task.name, f"documents in hub columns{published}")
    if not truth:
        raise UserError(f"{task.name}: LLaVA's answers need --truth: {wanted}")
    try:
        documents, key_of = JOINS.get(task.name, _documents)(task, _whole(task, truth))
    except BAD_ROW as error:
        raise UserError(f"{task.name}: --truth is not {wanted} ({error!r})") from error
    place = {key: row for row, key in enumerate(documents)}
    joined: dict[Key, Joined] = {}
    for number, answer in enumerate(_answers(answers), 1):
        key = key_of(answer)
        where = f"{answers} answer {number} (question_id {answer['question_id']!r})"
        if key not in documents:
            raise UserError(f"{where} is to no question in --truth")
        if key in joined:
            raise UserError(f"{where} is the second answer to one question")
        joined[key] = Joined("/".join(key), documents[key], answer["text"], place[key])
    return list(joined.values()), len(documents) - len(joined)


def _whole(task: Benchmark, truth: Sequence[Path]) -> list[Path]:
    """The files; in place of a folder its files, POPE's with LLaVA's question file."""
    found: list[Path] = []
    for path in truth:
        if not path.is_dir():
            found.append(path)
            continue
        files = task.layout.find(path, task.hub.split) if task.layout else []
        if not files:
            raise UserError(f"{path} has no files of {task.name}")
        found += files
        if task.name == "pope":
            found += only(find_files(path, "llava_pope_test.jsonl"))
    return found


def _answers(path: Path) -> list[Row]:
    """Rows with question_id, prompt and text; also from what eval_science_qa.py writes."""
    rows = read_rows(path)
    if rows[0].keys() >= {"image_id", "caption"}:  # the form of COCO's own results
        rows = [
            {"question_id": row.get("image_id"), "prompt": "", "text": row.get("caption")}
            for row in rows
        ]
    if {"correct", "incorrect"} <= rows[0].keys():
        judged = [rows[0]["correct"], rows[0]["incorrect"]]
        if not all(isinstance(x, list) and all(isinstance(y, dict) for y in x) for x in judged):
            raise UserError(f"{path} has no lists of answers under correct and incorrect")
        rows = [
            row | {"text": row.get("pred"), "prompt": row.get("question")}
            for group in judged
            for row in group
        ]
    for number, row in enumerate(rows, 1):
        for column in ("question_id", "prompt", "text"):
            if not isinstance(row.get(column), str | (int if column == "question_id" else str)):
                raise UserError(f"{path} answer {number} has no {column}")
    return rows


def _by_question_id(answer: Row) -> Key:
    return (str(answer["question_id"]),)


def _pope(task: Benchmark, truth: Sequence[Path]) -> Documents:
    """The n-th question of a category in the question file has the n-th label of its file."""
    labels: dict[str, list[Row]] = {}
    questions: list[Row] = []
    documents: dict[Key, Row] = {}
    for path in truth:
        rows = read_rows(path)
        if "category" in rows[0]:
            questions += rows
        else:
            category = next(name for name in (*CATEGORIES, path.stem) if name in path.stem)
            if labels.setdefault(category, rows) is not rows:
                raise UserError(f"pope: --truth has two label files of category {category!r}")
    if labels and not questions:  # asked straight from one label file, by its own ids
        if len(labels) > 1:
            raise UserError(
                f"pope: ids repeat in the label files; --truth takes {TRUTH_FILES['pope']}"
            )
        for document in read_documents(truth, task):
            _add(documents, _by_question_id(document), document)
    waiting = {category: iter(rows) for category, rows in labels.items()}
    for row in questions:
        question = row["text"].removesuffix(f"\n{SHORT_ANSWER}")
        label = next(waiting.get(row["category"], iter(())), None)
        if label is None or label["text"] != question:
            raise UserError(
                f"pope: question {row['question_id']} ({row['category']}, {question!r}) has no "
                f"label in its place; --truth takes {TRUTH_FILES['pope']}"
            )
        document = {
            "question_id": str(row["question_id"]),
            "question": question,
            "answer": label["label"],
            "image_source": Path(row["image"]).stem,
            "category": row["category"],
        }
        _add(documents, _by_question_id(row), document)
    return documents, _by_question_id


def _mme(task: Benchmark, truth: Sequence[Path]) -> Documents:
    """A question is known by subtask, image name without suffix, and its text."""

    def key(image: str, question: str) -> Key:
        bare = question.replace(SHORT_ANSWER, "").replace(YES_OR_NO.strip(), "").strip()
        return (image.split("/")[0], Path(image).stem, bare)

    documents: dict[Key, Row] = {}
    texts = all(path.suffix == ".txt" for path in truth)
    rows = read_documents(truth, task) if texts else [r for path in truth for r in read_rows(path)]
    for row in rows:
        image = row.get("question_id") or f"{row['category']}/{row['image']}"
        kept = {column: row[column] for column in ("question", "answer", "category")}
        _add(documents, key(image, row["question"]), {"question_id": image, **kept})
    return documents, lambda answer: key(str(answer["question_id"]), answer["prompt"])


def _add(documents: dict[Key, Row], key: Key, document: Row) -> None:
    """Keep a document; one that differs from an earlier one of the same key would replace it."""
    if documents.setdefault(key, document) != document:
        raise UserError(f"--truth has two documents for question {'/'.join(key)!r}")


def _scienceqa(task: Benchmark, truth: Sequence[Path]) -> Documents:
    documents: dict[Key, Row] = {}
    problems = read_published(truth, task)
    for row in problems or ():
        _add(documents, (row["question_id"],), task.without_image(row))
    for row in () if problems else (row for path in truth for row in read_json(path)):
        _add(documents, (str(row["id"]),), _conversation(row))
    return documents, _by_question_id


def _conversation(row: Row) -> Row:
    """The document of an entry of LLaVA's question file, where the prompt is one text."""
    asked, answered = (turn["value"] for turn in row["conversations"][:2])
    question, choices = split_choices(asked.removeprefix("<image>\n"))
    return {
        "question": question,
        "choices": choices,
        "answer": ascii_uppercase.index(answered),
        "hint": "",
        "has_image": "image" in row,
    }


def split_choices(text: str) -> tuple[str, list[str]]:
    """The question and the choices of a block that ends "\\nA. one\\nB. two".

    A choice may have several lines. Without choices the whole block is the question.
    """
    lines = text.removesuffix(f"\n{OPTION_LETTER}").split("\n")
    start = max((i for i, line in enumerate(lines) if line.startswith("A. ")), default=len(lines))
    choices: list[str] = []
    for line in lines[start:]:
        mark = f"{ascii_uppercase[len(choices)]}. "
        if line.startswith(mark):
            choices.append(line.removeprefix(mark))
        else:
            choices[-1] += f"\n{line}"
    return "\n".join(lines[:start]), choices


def _documents(task: Benchmark, truth: Sequence[Path]) -> Documents:
    """Documents in hub columns; where an id repeats, the question's text tells them apart."""
    rows = read_documents(truth, task)
    column = ID_COLUMNS.get(task.name, "question_id")
    repeated = len({row[column] for row in rows}) < len(rows)

    def key(identifier: object, question: str) -> Key:
        name = str(identifier).removeprefix("v1_")  # MM-Vet's documents have it, answers do not
        if task.name == "coco_cap":  # a file's name here, an image's number there
            name = str(task.submission_id({"question_id": identifier}))
        asked = question.split("\n")
        first = asked[question.startswith(OCR_LINE) and len(asked) > 1]  # TextVQA with --ocr first
        return (name, first.strip().lower()) if repeated else (name,)

    documents: dict[Key, Row] = {}
    for row in rows:
        _add(documents, key(row[column], row.get("question", "")), row)
    return documents, lambda answer: key(answer["question_id"], answer["prompt"])


JOINS = {"pope": _pope, "mme": _mme, "scienceqa": _scienceqa}
