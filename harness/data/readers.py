"""Tables of documents and answers in whatever file they come: rows as dicts, never the pixels.

    rows = read_rows(Path("answers.jsonl"))            # also .json .parquet .tsv .csv .xlsx
    rows = read_documents([Path("test-0.parquet")], tasks.load("scienceqa"))

Every unreadable file is a UserError that names it.
"""

from __future__ import annotations

import csv
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from tasks.cells import looks_like_list, read_list
from tasks.common import Benchmark
from tasks.published import read_json
from vlmamba_core.errors import UserError

Row = dict[str, Any]
# What an entry of the wrong shape raises.
BAD_ENTRY = (AttributeError, IndexError, KeyError, TypeError, ValueError)
# What Excel's reader raises on damaged files, besides OSError.
BAD_SHEET = (ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError, EOFError)


TABLES = (".tsv", ".csv", ".xlsx")  # formats whose cells are all text


def read_documents(paths: Sequence[Path], task: Benchmark) -> list[Row]:
    """All rows of the files, in order, as `task` keeps a document without its image.

    Files (or a folder) of the benchmark's own published layout are read as well.
    """
    published = read_published(paths, task)
    if published is not None:
        return [task.without_image(row) for row in published]
    return [task.without_image(row) for path in paths for row in read_task_rows(path, task)]


def read_published(paths: Sequence[Path], task: Benchmark) -> list[Row] | None:
    """The rows of a benchmark's own published files, or of a folder with them; None for others.

    Raises UserError where a folder holds none, and for files that break off.
    """
    if task.layout is None or not paths:
        return None
    files: list[Path] = []
    for path in paths:
        found = task.layout.find(path, task.hub.split) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path} has no files of {task.name}: {task.layout.description}")
        files += found
    if not all(file.suffix in (".json", ".jsonl", ".txt") and is_file(file) for file in files):
        return None
    try:
        return task.layout.read(files, task.hub.split)
    except BAD_ENTRY as error:
        raise UserError(
            f"{files[0]} is not whole: {task.layout.description} ({error!r})"
        ) from error


def read_task_rows(path: Path, task: Benchmark) -> list[Row]:
    """The rows of one file for `task`: `read_rows`, and lists where the task has lists.

    Raises UserError where a cell of a table should hold a list and does not.
    """
    rows = read_rows(path, task.image_columns)
    return lists_read(rows, task, path) if path.suffix in TABLES else rows


def lists_read(rows: list[Row], task: Benchmark, path: Path) -> list[Row]:
    """The rows of a table with the task's lists read from their cells. Raises UserError."""
    for number, row in enumerate(rows, 1):
        for column in task.list_columns:
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                continue
            if (value := read_list(text)) is not None:
                row[column] = value
            elif not task.text_lists or looks_like_list(text):
                raise UserError(
                    f"{path} row {number}: column {column!r} is {text!r:.60}; expected a list such "
                    "as ['one', 'two']"
                )
    return rows


def read_rows(path: Path, image_columns: Sequence[str] = ("image",)) -> list[Row]:
    """The rows of one file, at least one. Of an image column in Parquet or a table only presence
    is kept."""
    if not is_file(path):
        raise UserError(f"no file {str(path)!r}")
    readers = {".parquet": _parquet, ".tsv": _table, ".csv": _table, ".xlsx": _table}
    rows = readers.get(path.suffix, _json)(path, image_columns)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def repeat_note(rows: Sequence[object]) -> list[str]:
    """A sentence on rows that equal an earlier one: they count, but nobody may want them to."""
    repeats = len(rows) - len({json.dumps(row, sort_keys=True, default=str) for row in rows})
    which = "row repeats" if repeats == 1 else "rows repeat"
    return [f"{repeats} {which} an earlier one in every column and count again"] * bool(repeats)


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _json(path: Path, image_columns: Sequence[str]) -> list[Row]:
    content = read_json(path)
    if not isinstance(content, list):
        content = [content]
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {number} is {_kind(row)}, expected a JSON object")
    return content


def _parquet(path: Path, image_columns: Sequence[str]) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        rows = file.read(columns=[name for name in names if name not in image_columns]).to_pylist()
        for image_column in set(image_columns) & set(names):
            batches = file.iter_batches(batch_size=64, columns=[image_column])
            present = [there for batch in batches for there in batch.column(0).is_valid()]
            for row, there in zip(rows, present, strict=True):
                row[image_column] = there.as_py() or None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        # pyarrow's own errors; text that is not UTF-8; a date beyond Python's
        raise UserError(f"{path} is not a readable parquet file: {error}") from error
    return rows


def read_table(path: Path) -> list[Row]:
    """A spreadsheet or separated text: every cell a string, an empty cell an empty string.

    Raises UserError for a row of separated text with more or fewer cells than the header, and for
    a column that comes twice: either would put cells under the wrong name.
    """
    if path.suffix == ".xlsx":
        return _spreadsheet(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(_separated(path, csv.reader(file, _dialect(path), strict=True)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} as a table: {error}") from error


def _dialect(path: Path) -> type[csv.Dialect]:
    csv.field_size_limit(sys.maxsize)  # a cell may be an image in base64
    return csv.excel_tab if path.suffix == ".tsv" else csv.excel


def _separated(path: Path, lines: Any) -> Iterator[Row]:
    header: list[str] = next(lines, [])
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} comes twice")
    for cells in lines:
        if cells and len(cells) != len(header):
            raise UserError(
                f"{path} line {lines.line_num}: {len(cells)} cells, but the header has "
                f"{len(header)}; the file is cut or has a loose tab or quote"
            )
        if cells:
            yield dict(zip(header, cells, strict=True))


def _spreadsheet(path: Path) -> list[Row]:
    import pandas as pd

    try:
        frame = pd.read_excel(path, dtype=str, keep_default_na=False)
    except (OSError, BadZipFile, NotImplementedError, zlib.error, *BAD_SHEET) as error:
        raise UserError(f"cannot read {path} as a table: {error}") from error
    return [
        {str(name): "" if cell != cell else cell for name, cell in row.items()}
        for row in frame.to_dict("records")
    ]


def _table(path: Path, image_columns: Sequence[str]) -> list[Row]:
    rows = read_table(path)
    for row in rows:
        for image_column in set(image_columns) & set(row):
            row[image_column] = True if row[image_column] else None
    return rows


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
