"""A benchmark's rows as questions: each row is read once, its prompt made once.

    questions = read(tasks.load("pope"), source.rows(task), "paper", limit=100)

All that answering and scoring need to know of a row is decided here: its document (without pixels),
prompt, reference, and the key of its image.  Images stay where they are: a stored one is a view of
the file's memory until somebody asks for the picture.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from harness.data.images import UnreadableImage, decode, image_key
from tasks.common import HAS_IMAGE, Benchmark, check_lists
from vlmamba_core.errors import UserError, first_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from harness.data.sources import Source

NO_IMAGE = "none"  # in place of an image's key: the question has none
ROWS_AT_ONCE = 256
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Question:
    """One row of a benchmark; `row` counts from 0.

    doc: every column but the images, and `has_image` where that is not always so.  images: as they
    are stored, in the order in which they are shown.  image_key: of their contents, joined by "+";
    NO_IMAGE without any, None where one cannot be read, for the reason in `trouble`.  refusal: what
    is wrong where that is something else than a picture.  requests: those that an `OwnRows` makes.
    """

    task: Benchmark
    row: int
    doc: Row
    prompt: str
    reference: Any
    images: tuple[Any, ...] = ()
    image_key: str | None = NO_IMAGE
    trouble: str = ""
    refusal: str = ""
    requests: Sequence[Any] = ()

    @property
    def image_keys(self) -> list[str]:
        """The key of each image; empty without any, and where one cannot be read."""
        return [] if self.image_key in (None, NO_IMAGE) else str(self.image_key).split("+")

    def picture(self, place: int = 0) -> Image.Image:
        """One decoded image, RGB. Raises UnreadableImage."""
        return decode(self.images[place]).convert("RGB")


class OwnRows(Benchmark):
    """A benchmark of another library, which knows itself where its rows are and what is asked."""

    @abstractmethod
    def questions(self, source: Source, limit: int | None) -> list[Question]:
        """The first `limit` rows with their requests. Raises UserError without data."""

    @abstractmethod
    def described(self, source: Source) -> dict[str, Any]:
        """The settings of its data, for the record."""

    @abstractmethod
    def together(self, answers: Sequence[str]) -> str:
        """The answers to a question's requests as one, which scoring takes apart."""

    @abstractmethod
    def keep_files(self, place: Path) -> None:
        """Let scoring write files of its own below this folder."""


class SecondTable:
    """Images that rows only name (GQA's): looked up in a table of their own.

    As a `datasets` transform it puts the image into every row that is read.
    """

    def __init__(self, task: Benchmark, images: datasets.Dataset, number: Mapping[str, int]):
        self._column, self._named = task.image_column, task.image_id_column
        self._images, self._number = images, number
        self._seen: dict[str, Any] = {}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """The batch with its images."""
        found = self._images[[self._number[str(name)] for name in batch[self._named]]]
        return {**batch, self._column: list(map(or_gap, found[self._column]))}

    def image(self, row: Mapping[str, Any]) -> Any:
        """The stored image of one row."""
        name = str(row[self._named])
        if name not in self._seen:
            table = self._images.with_format("arrow")[self._number[name]]
            self._seen[name] = or_gap(_stored(table.column(self._column)[0]))
        return self._seen[name]


def or_gap(image: Any) -> Any:
    """An absent image as an unreadable one: its question is counted as left out."""
    return {"bytes": b"", "path": None} if image is None else image


def read(
    task: Benchmark,
    rows: datasets.Dataset | pyarrow.Table,
    protocol: str,
    limit: int | None = None,
) -> list[Question]:
    """The first `limit` rows as questions; a bare table has no other images than the task's.

    Raises UserError naming the first row and column whose value the task cannot use.
    """
    each = _each_of_table if hasattr(rows, "to_batches") else _each
    return [
        _question(task, number, row, stored, protocol)
        for number, (row, stored) in enumerate(each(task, rows, limit))
    ]


def check_usable(task: Benchmark, rows: datasets.Dataset, protocol: str) -> None:
    """Raise UserError naming the first row and column whose value the task cannot use."""
    for number, (row, _) in enumerate(_each(task, without_images(rows), None)):
        _prompt_and_reference(task, number, row, protocol)


def without_images(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows without their image columns."""
    return rows.with_format(None).remove_columns(_image_columns(rows))  # nor a second table


def _image_columns(rows: datasets.Dataset) -> list[str]:
    import datasets

    def holds_images(kind: Any) -> bool:
        return isinstance(getattr(kind, "feature", kind), datasets.Image)

    return [column for column, kind in rows.features.items() if holds_images(kind)]


def _question(task: Benchmark, number: int, row: Row, stored: Row, protocol: str) -> Question:
    doc, trouble = row, ""
    key: str | None = NO_IMAGE
    if task.text_only_questions:  # a column of that name in the data does not count
        doc = {column: cell for column, cell in row.items() if column != HAS_IMAGE}
        doc[HAS_IMAGE] = bool(task.image_cells(stored, protocol))
    prompt, reference = _prompt_and_reference(task, number, doc, protocol)
    images = [or_gap(image) for image in task.image_cells({**row, **stored}, protocol)]
    if not images and not task.text_only_questions:
        images = [or_gap(None)]
    if images:
        try:
            key = "+".join(map(image_key, images))
        except UnreadableImage as error:
            key, trouble = None, str(error)
    return Question(task, number, doc, prompt, reference, tuple(images), key, trouble)


def _prompt_and_reference(task: Benchmark, number: int, row: Row, protocol: str) -> tuple[str, Any]:
    doc = _Watched(row)
    try:
        if "question" in task.columns and not isinstance(doc["question"], str):
            raise TypeError("expected text")
        check_lists(task, doc)
        prompt, reference = task.prompt(doc, protocol), task.reference(doc)
        task.cluster(doc)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        value = repr(row.get(doc.last))[:60]
        raise UserError(
            f"{task.name}: row {number + 1} cannot be used: column {doc.last!r} is {value} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    return prompt, reference


class _Watched(Mapping[str, Any]):
    """A row that remembers which column was read last: the one to name when reading fails."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self.last = ""

    def __getitem__(self, column: str) -> Any:
        self.last = column
        return self._row[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def _each_of_table(
    task: Benchmark, table: pyarrow.Table, limit: int | None
) -> Iterator[tuple[Row, Row]]:
    """See `_each`."""
    table = table.slice(0, limit)
    shown = [column for column in task.image_columns if column in table.column_names]
    cells = {column: table.column(column) for column in shown}
    for place, row in enumerate(_values(task, table.drop_columns(shown), 0)):
        yield row, {column: _stored(cells[column][place]) for column in shown}


def _each(task: Benchmark, rows: datasets.Dataset, limit: int | None) -> Iterator[tuple[Row, Row]]:
    """Each row as Python values without its images, and its image cells as they are stored.

    Raises UserError where a row has no such values.
    """
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    images = [column for column in _image_columns(rows) if column in rows.column_names]
    shown = [column for column in task.image_columns if column in images]
    look_up = rows.format["format_kwargs"].get("transform")
    first = 0
    for batch in rows.with_format("arrow").iter(ROWS_AT_ONCE):
        cells = {column: batch.column(column) for column in shown}
        for place, row in enumerate(_values(task, batch.drop_columns(images), first)):
            stored = {column: _stored(cells[column][place]) for column in shown}
            yield row, {task.image_column: look_up.image(row)} if look_up else stored
        first += len(batch)


def _values(task: Benchmark, table: pyarrow.Table, first: int) -> list[Row]:
    """The rows of a table as Python values; `first` is the number of its first row."""
    refused = (UnicodeDecodeError, OverflowError)  # text not in UTF-8, a date too far
    try:
        return table.to_pylist()
    except refused:
        for place in range(len(table)):
            try:
                table.slice(place, 1).to_pylist()
            except refused as error:
                row = first + place + 1
                raise UserError(f"{task.name}: row {row} cannot be read: {error}") from error
        raise


def _stored(cell: Any) -> Any:
    """A cell of an image column: {"bytes": a view of the table's memory, "path"}; None if empty.

    A list of such for a cell that holds several.
    """
    if not cell.is_valid:
        return None
    if hasattr(cell.type, "value_type"):  # of a list
        return [_stored(one) for one in cell.values]
    content = cell["bytes"].as_buffer()
    view = None if content is None else memoryview(content)
    return {"bytes": view, "path": cell["path"].as_py()}
