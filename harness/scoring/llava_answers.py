"""LLaVA's answers.jsonl (question_id, prompt, text), each answer joined with its document.

The truth of LLaVA's evaluation files stands elsewhere, in another shape for each benchmark: how its
answers find their documents is the benchmark's own (`Benchmark.llava`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.data.readers import Row, read_documents, read_published, read_rows
from tasks.answer_files import Key, LlavaAnswers
from tasks.common import Benchmark
from tasks.published import find_files, only
from vlmamba_core.errors import UserError

# What reading a row of the wrong shape raises.
BAD_ROW = (AttributeError, IndexError, KeyError, TypeError, ValueError, SyntaxError, RecursionError)


class Joined(NamedTuple):
    """One answer with its document."""

    case_id: str
    doc: Row
    prediction: str
    row: int | None = None  # of the document in the truth; None: as in the answers
    image: str | None = None  # the key of its picture's content, where a run has noted it


@dataclass(frozen=True)
class Truth:
    """The files of --truth, as a benchmark reads them (tasks.answer_files.TruthFiles)."""

    task: Benchmark
    paths: Sequence[Path]

    def rows(self, path: Path) -> list[Row]:
        """The rows of one file as they stand."""
        return read_rows(path)

    def documents(self) -> list[Row]:
        """The rows of all files in hub columns, without pixels."""
        return read_documents(self.paths, self.task)

    def published(self) -> list[Row] | None:
        """The rows of the benchmark's own published files; None where the files are others."""
        return read_published(self.paths, self.task)


class WrongFormat(UserError):
    """A file that is not of the format that it was to be read in."""


def load(task: Benchmark, answers: Path, truth: Sequence[Path]) -> tuple[list[Joined], int]:
    """The answers of a file as `join` joins them. Raises UserError."""
    return join(task, task.llava, lambda: _answers(answers), answers, truth)


def join(
    task: Benchmark,
    how: LlavaAnswers,
    read: Callable[[], list[Row]],
    path: Path,
    truth: Sequence[Path],
) -> tuple[list[Joined], int]:
    """The answers in their own order, each with its document; and how many documents have none.

    read: the rows of question_id, prompt and text that `path` holds.  Raises UserError for truth
    files that do not fit, an answer without a document, or two answers to one question.
    """
    published = f", or as published {task.layout.description}" if task.layout else ""
    wanted = how.truth or f"documents in hub columns{published}"
    answers = read()  # first: of a file of another format nobody wants to know more
    if not truth:
        raise UserError(f"{task.name}: these answers need --truth: {wanted}")
    try:
        documents, key_of = how.documents(Truth(task, _whole(task, truth)))
    except BAD_ROW as error:
        raise UserError(f"{task.name}: --truth is not {wanted} ({error!r})") from error
    place = {key: row for row, key in enumerate(documents)}
    joined: dict[Key, Joined] = {}
    unknown = 0
    for number, answer in enumerate(answers, 1):
        keys = list(how.served(key_of(answer), documents))
        where = f"{path} answer {number} (question_id {answer['question_id']!r})"
        unknown += not keys
        if not (keys or how.looked_up):
            raise UserError(f"{where} is to no question in --truth")
        for key in keys:
            if key in joined and not how.looked_up:
                raise UserError(f"{where} is the second answer to one question")
            joined[key] = Joined("/".join(key), documents[key], answer["text"], place[key])
    if not joined:
        raise UserError(f"{path} answers no question of --truth")
    if unknown:
        warnings.warn(
            f"{unknown} answers of {path} are to no question in --truth; as the official script "
            "does, they are not looked at",
            stacklevel=2,
        )
    rest = [document for key, document in documents.items() if key not in joined]
    return list(joined.values()), sum(map(task.awaits, rest))


def _whole(task: Benchmark, truth: Sequence[Path]) -> list[Path]:
    """The files; in place of a folder its files, with LLaVA's own where the task has one."""
    found: list[Path] = []
    for path in truth:
        if not path.is_dir():
            found.append(path)
            continue
        files = task.layout.find(path, task.hub.split) if task.layout else []
        if not files:
            raise UserError(f"{path} has no files of {task.name}")
        found += files
        if task.llava.beside:
            found += only(find_files(path, task.llava.beside))
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
            raise WrongFormat(f"{path} has no lists of answers under correct and incorrect")
        rows = [
            row | {"text": row.get("pred"), "prompt": row.get("question")}
            for group in judged
            for row in group
        ]
    for number, row in enumerate(rows, 1):
        for column in ("question_id", "prompt", "text"):
            if not isinstance(row.get(column), str | (int if column == "question_id" else str)):
                raise WrongFormat(
                    f"{path} answer {number} has no {column}; LLaVA's answers have question_id, "
                    "prompt and text"
                )
    return rows
