"""Official submission files, for benchmarks whose truth is hidden.

    python -m harness.score mmbench predictions.jsonl --submit mmbench_test.xlsx

What goes into the file is the benchmark's own `submission`; here it becomes JSON, or a spreadsheet
for a server that takes one (MMBench). A server refuses a file that lacks a question, has one twice
or knows another one, so every file is completed and checked before it is written: a question
without an answer gets an empty one, and is counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import Benchmark, Doc
from vlmamba_core.errors import UserError

if TYPE_CHECKING:
    import datasets

    from harness.data.sources import Source

NAMED = 3  # questions without an answer that a note names


@dataclass(frozen=True)
class Wanted:
    """The questions that a server wants an entry for; `docs` None: not known, `why` says so.

    chosen: the ids among them that the chosen split asks; None: all.
    """

    docs: Sequence[Doc] | None
    why: str = ""
    chosen: frozenset[Any] | None = None


def file_name(task: Benchmark) -> str | None:
    """What a submission file is called in a folder; None for a benchmark without a test server."""
    return f"{task.name}_submission{task.submission_suffix}" if task.submission_suffix else None


def wanted(task: Benchmark, source: Source, rows: datasets.Dataset) -> Wanted:
    """What the server of `task` wants, for a run on `rows` (all of the chosen split's).

    Raises UserError where a row has no id or one that comes twice, or is none of the server's.
    """
    from harness.data.questions import without_images

    split, column = task.submission_split, task.submission_column
    table = without_images(rows)
    if split is not None and column in table.column_names:
        table = table.select_columns([column])  # 447,793 rows of VQAv2, of which the id is enough
    asked = list(table)
    if source.kind == "demo" or split in (None, source.hub(task).split):
        _by_id(task, asked)
        return Wanted(asked)
    try:
        docs = source.questions(task, str(split))
    except UserError as error:
        _by_id(task, asked)
        return Wanted(
            None,
            f"it wants an entry for every question of split {split!r}, which cannot be read "
            f"({error}); put that split beside the data and run the same command again",
        )
    complete(task, asked, [""] * len(asked), Wanted(docs))
    return Wanted(docs, chosen=frozenset(_by_id(task, asked)))


def complete(
    task: Benchmark, docs: Sequence[Doc], predictions: Sequence[str], whole: Wanted
) -> tuple[Sequence[Doc], Sequence[str], list[str]]:
    """One entry for each wanted question, in order, "" where it has no answer; and notes on that.

    Raises UserError for an answer to a question that is not wanted, and for an id that comes twice.
    """
    answered = _by_id(task, docs)
    if whole.docs is None:
        return docs, predictions, [f"the test server refuses this file as it stands: {whole.why}"]
    ids = _by_id(task, whole.docs)
    strange = [name for name in answered if name not in ids]
    if strange:
        raise UserError(
            f"{task.name}: {len(strange)} of {len(docs)} answers, the first to "
            f"{task.submission_column} {strange[0]!r}, are to no question that the test server "
            f"asks{_of_split(task)}"
        )
    filled = [predictions[answered[name]] if name in answered else "" for name in ids]
    return whole.docs, filled, _gaps(task, [name for name in ids if name not in answered], whole)


def _gaps(task: Benchmark, unanswered: Sequence[Any], whole: Wanted) -> list[str]:
    """Sentences on the entries that are empty: those of another split, and those left out."""
    left = [name for name in unanswered if whole.chosen is None or name in whole.chosen]
    elsewhere = len(unanswered) - len(left)
    notes = []
    if elsewhere:
        notes.append(
            f"{elsewhere} answers in it are empty: the server wants every question"
            f"{_of_split(task)}, and the chosen split does not ask these"
        )
    if left:
        first = ", ".join(str(name) for name in left[:NAMED])
        notes.append(
            f"{len(left)} answers in it are empty and count as wrong: not asked (first "
            f"{task.submission_column}: {first}); for a result answer all, without --limit"
        )
    return notes


def _of_split(task: Benchmark) -> str:
    return f" of split {task.submission_split!r}" if task.submission_split else ""


def _by_id(task: Benchmark, docs: Sequence[Doc]) -> dict[Any, int]:
    """Id -> row. Raises UserError where an id is missing or comes twice."""
    rows: dict[Any, int] = {}
    for row, doc in enumerate(docs):
        name = task.submission_id(doc)
        if rows.setdefault(name, row) != row:
            raise UserError(
                f"{task.name}: rows {rows[name] + 1} and {row + 1} have one "
                f"{task.submission_column}, {name!r}; the test server takes one answer a question"
            )
    return rows


def write(
    task: Benchmark,
    docs: Sequence[Doc],
    predictions: Sequence[str],
    path: Path,
    whole: Wanted | None = None,
) -> tuple[int, list[str]]:
    """Write the submission file of `task`; returns how many entries it has, and notes on it.

    whole: what the server wants; None: exactly these questions. Raises UserError for a benchmark
    without a server, a wrong suffix, an incomplete file's causes (see `complete`), or a place that
    is not writable.
    """
    suffix = task.submission_suffix
    if suffix is None:
        task.submission((), ())  # says that there is none
    if path.suffix != suffix:
        raise UserError(f"the {task.name} submission is a {suffix} file, but --submit is {path}")
    docs, predictions, notes = complete(task, docs, predictions, whole or Wanted(docs))
    content = task.submission(docs, predictions)
    try:
        if suffix == ".xlsx":
            write_spreadsheet(content, path)
        else:
            text = json.dumps(content, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")  # as JSON writes it
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return len(docs), notes


def write_spreadsheet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows with the same keys as one sheet, without the control characters that it cannot hold."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook()
    sheet = book.active
    sheet.append(list(rows[0]))
    for number, row in enumerate(rows, 2):
        for column, value in enumerate(row.values(), 1):
            cell = sheet.cell(number, column)
            if isinstance(value, str):
                whole = value.encode("utf-8", "ignore").decode()  # no half of a surrogate pair
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", whole)
                cell.data_type = "s"  # an answer that starts with "=" is no formula
            else:
                cell.value = value
    book.save(path)
