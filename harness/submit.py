"""Official submission files, for benchmarks whose truth is hidden.

    python -m harness.score mmbench predictions.jsonl --submit mmbench_test.xlsx

What goes into the file is the benchmark's own `submission`; here it becomes JSON, or a spreadsheet
for a server that takes one (MMBench).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.common import Benchmark, Doc
from tasks.errors import UserError


def file_name(task: Benchmark) -> str | None:
    """What a submission file is called in a folder; None for a benchmark without a test server."""
    return f"{task.name}_submission{task.submission_suffix}" if task.submission_suffix else None


def write(task: Benchmark, docs: Sequence[Doc], predictions: Sequence[str], path: Path) -> None:
    """Write the submission file of `task`.

    Raises UserError for a benchmark without one, a wrong suffix, or a place that is not writable.
    """
    content = task.submission(docs, predictions)
    suffix = task.submission_suffix
    if path.suffix != suffix:
        raise UserError(f"the {task.name} submission is a {suffix} file, but --submit is {path}")
    try:
        if suffix == ".xlsx":
            write_spreadsheet(content, path)
        else:
            text = json.dumps(content, ensure_ascii=False) + "\n"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")  # as JSON writes it
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


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
