"""A benchmark's rows in a local folder: finding the files, and reading every format they come in.

    TASK.parquet, TASK-00000-of-00003.parquet   images inside, as hub data sets store them
    TASK.jsonl, TASK.json, TASK.csv             images as paths inside the folder or its images/
    TASK.tsv, MMBench_DEV_EN.tsv                published tables with images in base64
    v2_mscoco_val2014_annotations.json, ...     the benchmark's own published files, anywhere inside
    TASK/ or POPE/, ...                         any of these, or a copy of the hub's repository

Images stay undecoded ({"bytes", "path"}): one broken image then costs one row, not the run.
"""

from __future__ import annotations

import base64
import binascii
import copy
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data import splits
from harness.data.readers import BAD_ENTRY, Row, is_file, lists_read, read_table, read_task_rows
from tasks.common import Benchmark, Hub
from tasks.published import image_files
from vlmamba_core.errors import UserError, first_line
from vlmamba_core.folder import digest

if TYPE_CHECKING:
    import datasets

FORMATS = (".parquet", ".jsonl", ".json", ".tsv", ".csv")
LANGUAGES = {"en", "cn", "cc", "ru", "ar", "de", "fr", "pt", "tr"}  # of MMBench's tables
LONGEST_REFERENCE = 64  # a shorter image cell is the index of the row that holds the image


def find(root: Path, task: Benchmark, hub: Hub) -> list[Path]:
    """The task's files in a folder, best-named layout first; empty if there are none.

    Raises UserError for a part of a sharded file, files of other splits only, and several tables.
    """
    for suffix in FORMATS:
        if (root / f"{task.name}{suffix}").is_file():
            return [root / f"{task.name}{suffix}"]
    if shards := sorted(root.glob(f"{task.name}-*-of-*.parquet")):
        return splits.of_split(shards, root, Hub(hub.path, split=task.name))
    start = f"{task.table_name or task.name}_{hub.split}"
    tables = [file for file in sorted(root.glob("*.tsv")) if file.stem.lower().startswith(start)]
    if found := _only(_in_language(tables, root, hub, "en")):
        return found
    if task.layout and (files := task.layout.find(root, hub.split)):
        return files
    names = {task.name.lower(), hub.path.split("/")[-1].lower()}
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    folders.sort(key=lambda path: path.name.lower() != task.name.lower())  # its own name first
    for folder in (root, *folders):
        if names & splits.names_of(folder) and (files := _in_folder(folder, task, hub)):
            return files
    return []


def load(root: Path, task: Benchmark, hub: Hub) -> datasets.Dataset:
    """The rows of the files that `find` gives, images undecoded. Raises UserError."""
    files = find(root, task, hub)
    if task.layout and files == task.layout.find(root, hub.split):
        return _published(files, root, task, hub)
    if files[0].suffix == ".parquet":
        return _parquet(files, root, task)
    return _records(files, root, task)


def load_unknown(files: Sequence[Path], root: Path, task: Benchmark) -> datasets.Dataset:
    """Rows of parquet files whose columns nobody has told; every picture in them undecoded.

    A column of {"bytes", "path"} holds pictures, whatever its file calls it.  Raises UserError.
    """
    import datasets

    if files[0].suffix != ".parquet":
        raise UserError(f"{task.name}: {files[0]} is no parquet file, which these data have to be")
    named = copy.copy(task)
    head = _features(files[0])
    named.more_image_columns = tuple(
        column
        for column, kind in head.items()
        if isinstance(inner := getattr(kind, "feature", kind), datasets.Image)
        or (isinstance(inner, dict) and inner.keys() == {"bytes", "path"})
    )
    return _parquet(files, root, named, needed=tuple(head))


def _features(file: Path) -> datasets.Features:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return datasets.Features.from_arrow_schema(pq.read_schema(file))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable parquet file: {first_line(error)}") from error


def read_column(files: Sequence[Path], column: str) -> list[Row]:
    """One column of parquet files as rows: the images stay on disk. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    for file in files:
        try:
            rows += pq.ParquetFile(file).read(columns=[column]).to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{file} is not a readable parquet file: {first_line(error)}"
            ) from error
    return rows


def whats_there(root: Path, most: int = 3) -> str:
    """The data files of a folder for an error: a few names, and how many more there are."""
    kinds = (".parquet", ".arrow", ".jsonl", ".json", ".tsv", ".csv", ".xlsx")
    found = sorted(p.name for p in root.iterdir() if p.suffix.lower() in kinds and p.is_file())
    shown = ", ".join(found[:most])
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"{shown}{more}" if found else "no data file"


def names(files: Sequence[Path], root: Path) -> list[str]:
    """The files' names for a record; of the text files of one folder (MME's) the folder's alone."""
    inside = [file.relative_to(root) for file in files]
    return list(dict.fromkeys(str(f.parent / "*.txt" if f.suffix == ".txt" else f) for f in inside))


def load_images(
    root: Path, task: Benchmark, hub: Hub, questions: Sequence[Path] = ()
) -> datasets.Dataset | None:
    """The second table, which holds the images of a published data set such as GQA; None if absent.

    `hub` is the table's: its config names the folder that the files are in.  questions: the files
    of those; of several copies the images are looked for in that nearest above them.
    """
    if hub.name is None:
        return None
    needed = ("id", task.image_column)
    parents = questions[0].parents if questions else ()
    above = [parent for parent in parents if root in parent.parents]
    for top in (*above, splits.snapshot(root)):
        inside = [f for f in splits.under(top, ".parquet") if hub.name in f.relative_to(top).parts]
        if inside:
            return _parquet(splits.of_split(inside, top, hub), root, task, needed)
    return None


def check_columns(
    columns: Sequence[str], task: Benchmark, where: str, needed: Sequence[str] | None = None
) -> None:
    """Raise UserError naming the first column that is missing. `needed` replaces the task's."""
    image = () if task.image_hub else (task.image_column,)
    needed = needed or (*task.columns, *image)
    published = f", or as published {task.layout.description}" if task.layout else ""
    for column in needed:
        if column not in columns:
            raise UserError(
                f"{where}: no column {column!r} for task {task.name!r} (it has: "
                f"{', '.join(map(str, columns)) or 'none'}); expected: {', '.join(needed)}"
                f"{published}"
            )


def undecoded(rows: datasets.Dataset, task: Benchmark, where: str) -> datasets.Dataset:
    """The rows with their images as {"bytes", "path"}, never decoded by the reader."""
    import datasets
    import pyarrow as pa

    for column in task.image_columns:
        if column not in rows.column_names:
            continue
        kind = rows.features[column]
        stored: Any = datasets.Image(decode=False)
        several = isinstance(kind, datasets.List | datasets.LargeList)
        inner = kind.feature if several else kind
        if isinstance(inner, dict) and not {"bytes", "path"} & set(inner):
            raise UserError(f"{where}: column {column!r} holds {kind}, not images")
        try:
            rows = rows.cast_column(column, datasets.List(stored) if several else stored)
        except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{where}: column {column!r} holds {kind}, not images") from error
    return rows


def _in_folder(folder: Path, task: Benchmark, hub: Hub) -> list[Path]:
    chosen = hub.split != task.hub.split
    published = f", or as published {task.layout.description}" if task.layout else ""
    own = task.name.lower() in splits.names_of(folder)
    unsaid = hub.name if own and hub.name in LANGUAGES else "en"
    folder = splits.snapshot(folder)
    parquet = splits.under(folder, ".parquet")
    if hub.name in LANGUAGES:
        parquet = _in_language(parquet, folder, hub, unsaid)
    parts = [[f for f in parquet if name in f.relative_to(folder).parts] for name in task.configs]
    if any(parts):
        return [f for files in parts if files for f in splits.of_split(files, folder, hub, chosen)]
    if parquet:
        return splits.of_split(parquet, folder, hub, chosen)
    for suffix in FORMATS[1:]:
        if files := sorted(folder.glob(f"*{suffix}")):
            if suffix == ".tsv":
                return _only(_in_language(files, folder, hub, unsaid))
            return splits.of_split(files, folder, hub, chosen, published)
    return []


def _in_language(files: Sequence[Path], folder: Path, hub: Hub, unsaid: str) -> list[Path]:
    """The files whose path in the folder tells the data's language; `unsaid`: where it tells none.

    Data whose config is no language are English.
    """
    wanted = hub.name if hub.name in LANGUAGES else "en"
    words = {f: set(re.split(r"[\W_]+", str(f.relative_to(folder)).lower())) for f in files}
    return [file for file in files if wanted in (LANGUAGES & words[file] or {unsaid})]


def _only(tables: Sequence[Path]) -> list[Path]:
    """The one table, if any; raises UserError for several."""
    if len(tables) > 1:
        names = ", ".join(file.name for file in tables)
        raise UserError(f"{tables[0].parent} has several tables ({names}); keep the one to use")
    return list(tables)


def _parquet(
    files: Sequence[Path], root: Path, task: Benchmark, needed: Sequence[str] | None = None
) -> datasets.Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    filled = []
    for file in files:
        try:
            head = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file} is not a readable parquet file: {first_line(error)}"
            ) from error
        check_columns(head.schema.to_arrow_schema().names, task, str(file), needed)
        filled += [file] * bool(head.num_rows)
    if not filled:
        raise UserError(f"{files[0]} has no rows")
    try:
        rows = datasets.load_dataset("parquet", data_files=[str(f) for f in filled], split="train")
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError) as error:
        cause = first_line(error.__cause__ or error)
        raise UserError(f"cannot read {files[0]}: {cause}") from error
    return _confine_paths(undecoded(rows, task, str(files[0])), root, files[0].parent, task)


def _published(files: Sequence[Path], root: Path, task: Benchmark, hub: Hub) -> datasets.Dataset:
    """Rows of the benchmark's own files; their images are looked for in the whole folder."""
    layout = task.layout
    assert layout is not None  # it has found the files
    try:
        rows = layout.read(files, hub.split)
    except BAD_ENTRY as error:
        raise UserError(f"{files[0]} is not whole: {layout.description} ({error!r})") from error
    rows = [row for row in rows or () if task.asks(row)]  # videos would be missing pictures
    if not rows:
        raise UserError(f"{files[0]} has no rows of {layout.description}")
    locate, column = image_files(root, files[0]), task.image_column
    named = [row[column] for row in rows if row.get(column)]
    found = {name: _inside(root, root, name) for name in named}  # refuses a way out
    found |= {name: str(path) for name in found if (path := locate(name))}
    if named and not any(is_file(Path(path)) for path in found.values()):
        raise UserError(
            f"{task.name}: none of the {len(named)} images is in {root}; the first is "
            f"{named[0]!r}: put the benchmark's images there, or a link to them"
        )
    for row in rows:
        if name := row.get(column):
            row[column] = {"bytes": None, "path": found[name]}
    return _dataset(rows, task, files[0])


def _records(files: Sequence[Path], root: Path, task: Benchmark) -> datasets.Dataset:
    """Rows of JSON, CSV or TSV files as a data set."""
    rows: list[Row] = []
    for file in files:
        tables = {".tsv": _tsv_rows, ".csv": _csv_rows}
        found = tables.get(file.suffix, read_task_rows)(file, task)
        if not found:
            raise UserError(f"{file} has no rows")
        for number, row in enumerate(found, 1):
            check_columns(list(row), task, f"{file} row {number}")
            for column in task.image_columns:
                if column in row:
                    row[column] = _named_image(row[column])
        rows += found
    whole = _dataset(rows, task, files[0])
    return _confine_paths(whole, root, files[0].parent, task)


def _named_image(cell: Any) -> Any:
    """The images that a cell names; an empty cell is no image, not an unreadable one."""
    if isinstance(cell, list):
        return list(map(_named_image, cell))
    if not isinstance(cell, str):
        return cell
    return {"bytes": None, "path": cell} if cell else None


def _dataset(rows: Sequence[Row], task: Benchmark, file: Path) -> datasets.Dataset:
    """Rows as a data set, images undecoded; `file` is named where a column cannot be stored."""
    import datasets
    import pyarrow as pa

    columns = dict.fromkeys(name for row in rows for name in row)
    table: dict[str, datasets.Dataset] = {}
    for column in columns:
        try:
            values = {column: [row.get(column) for row in rows]}
            table[column] = datasets.Dataset.from_dict(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{file}: column {column!r} mixes types or cannot be stored: {first_line(error)}"
            ) from error
    return undecoded(datasets.concatenate_datasets(list(table.values()), axis=1), task, str(file))


def _csv_rows(file: Path, task: Benchmark) -> list[Row]:
    """Rows of a user's own table, whose image cells name files."""
    rows = lists_read(read_table(file), task, file)
    for row in rows:
        cells = {column: cell for column, cell in row.items() if column not in task.image_columns}
        row |= {column: task.empty_cell for column, cell in cells.items() if cell == ""}
    return rows


def _tsv_rows(file: Path, task: Benchmark) -> list[Row]:
    """Rows of a published table, as its hub copy has them, empty cells too.

    A rotated question may name, in place of an image, the index of the row that holds it. A cell
    that is no image at all is kept as it is: it counts as an unreadable one.
    """
    image_column = task.image_column
    rows = lists_read(read_table(file), task, file)
    images = {row.get("index"): row.get(image_column) for row in rows}
    for row in rows:
        if image := row.get(image_column):
            referred = images.get(image) if len(image) <= LONGEST_REFERENCE else None
            row[image_column] = {"bytes": _from_base64(referred or image), "path": None}
        elif image_column in row:
            row[image_column] = None
        row |= {column: task.empty_cell for column, cell in row.items() if cell == ""}
    return rows


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return text.encode()


def _confine_paths(
    rows: datasets.Dataset, root: Path, folder: Path, task: Benchmark
) -> datasets.Dataset:
    """Images stored as paths only, resolved inside the data folder they came with."""
    for column in task.image_columns:
        if column in rows.column_names and _has_paths(rows, column):
            named = digest([column, str(root), str(folder)])  # or a closure's hash is asked for
            resolver = _resolver(column, root, folder)
            rows = rows.map(
                resolver,
                features=rows.features,
                new_fingerprint=named,
                load_from_cache_file=False,
            )
    return rows


def _has_paths(rows: datasets.Dataset, column: str) -> bool:
    """Whether an image is stored as a path alone."""
    for chunk in rows.data.column(column).chunks:
        images = chunk.flatten() if hasattr(chunk, "value_lengths") else chunk  # lists of them
        if images.field("bytes").null_count and any(map(_is_path, images.to_pylist())):
            return True
    return False


def _is_path(image: Row | None) -> bool:
    return image is not None and image["bytes"] is None and image["path"] is not None


def _resolver(column: str, root: Path, folder: Path) -> Callable[[Row], Row]:
    def resolved(image: Any) -> Any:
        if isinstance(image, list):
            return list(map(resolved, image))
        if not _is_path(image):
            return image
        return {"bytes": None, "path": _inside(root, folder, image["path"])}

    return lambda row: {column: resolved(row[column])}


def _inside(root: Path, folder: Path, name: str) -> str:
    """The image file `name` under `root`, the file's folder, or the `images/` of either.

    Links are the user's own and are followed. Raises UserError if the name itself leads out of
    `root`: a data file may come from anybody.
    """
    home = Path(os.path.abspath(root))
    folder = Path(os.path.abspath(folder))
    for base in (home / "images", home, folder / "images", folder):
        path = Path(os.path.normpath(base / name))  # by the letter: ".." behind a link stays here
        if not path.is_relative_to(home):
            raise UserError(f"image path {name!r} leads out of the data folder {root}; refused")
        if is_file(path):
            return str(path)
    return str(home / name)  # absent: counted as unreadable when its turn comes
