"""Where a benchmark's rows come from: the demo world, the Hugging Face hub, or a local folder.

A folder holds, for each task, `TASK.parquet`, `TASK.jsonl` (image paths relative to the folder or
to its `images/`) or `TASK/` with the files of the published data set (`TASK` or the hub name, such
as `POPE/data/test-00000-of-00003.parquet`).

Images stay undecoded ({"bytes", "path"}): one broken image then costs one row, not the run.
Finding files (`Source.check`) imports nothing heavy, so that mistakes are reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import Benchmark
from tasks.errors import UserError, unknown

if TYPE_CHECKING:
    import datasets

STYLES = ("seen", "heldout", "validation")
DEMO_LABEL = "demo: not comparable with published numbers"


@dataclass(frozen=True)
class Source:
    """One choice of `--data`. `style` picks the demo's split; `root` is the folder, if any."""

    kind: str  # "demo", "hub" or "folder"
    style: str | None = None
    root: Path | None = None

    @classmethod
    def parse(cls, data: str, style: str | None = None) -> Source:
        """The source that `--data` and `--style` name. Raises UserError for a missing folder."""
        if style is not None and style not in STYLES:
            raise unknown("style", style, STYLES)
        if data == "demo":
            return cls("demo", style=style or "seen")
        if style is not None:
            raise UserError(f"--style {style} needs --data demo, but --data is {data!r}")
        if data == "hub":
            return cls("hub")
        root = Path(data).expanduser()
        if not root.is_dir():
            raise UserError(f"no data folder {data!r}; --data takes demo, hub or a folder")
        return cls("folder", root=root)

    @property
    def name(self) -> str:
        """A short name for folders and tables."""
        if self.kind == "demo":
            return f"demo-{self.style}"
        return self.kind if self.root is None else self.root.resolve().name

    @property
    def label(self) -> str | None:
        """What a table of these numbers must say, if anything."""
        return DEMO_LABEL if self.kind == "demo" else None

    def describe(self, task: Benchmark) -> dict[str, Any]:
        """The terms of a task's data, for the record."""
        terms: dict[str, Any] = {"source": self.name}
        if self.kind == "hub":
            hub = task.hub
            terms |= {"path": hub.path, "name": hub.name, "split": hub.split}
            terms["revision"] = hub.revision
        return terms

    def has(self, task: Benchmark) -> bool:
        """Whether the source holds the task (for a folder: has files for it)."""
        return self.root is None or bool(_folder_files(self.root, task))

    def check(self, task: Benchmark) -> None:
        """Raise UserError when a folder has no files for the task."""
        if self.root is not None and not self.has(task):
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:8]) or "nothing"
            raise UserError(
                f"no data for task {task.name!r} in {self.root}: expected {task.name}.parquet, "
                f"{task.name}.jsonl or {task.name}/*.parquet, found {found}"
            )

    def load(self, task: Benchmark, protocol: str) -> datasets.Dataset:
        """The task's rows, images undecoded.

        Raises UserError for unreadable files, missing columns (named), values of a wrong type, no
        rows, or no network.
        """
        import datasets

        datasets.disable_progress_bars()  # the model's bar over questions is the only one
        if self.kind == "hub":
            rows = _load_hub(task)
        elif self.root is None:
            rows = _load_folder(_demo_folder(task.name, self.style or "seen"), task)
        else:
            rows = _load_folder(self.root, task)
        if len(rows) == 0:
            raise UserError(f"{task.name}: the data of {self.name} has no rows")
        check_usable(task, rows, protocol)
        return rows


def without_images(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows without their image columns."""
    import datasets

    images = [c for c, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    return rows.remove_columns(images)


def check_usable(task: Benchmark, rows: datasets.Dataset, protocol: str) -> None:
    """Raise UserError naming the first row whose values are of a type the task cannot use."""
    for number, doc in enumerate(without_images(rows), 1):
        try:
            task.prompt(doc, protocol)
            task.truth(doc)
            task.cluster(doc)
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{task.name}: row {number} cannot be used ({type(error).__name__}: {error}); "
                f"check the types of {', '.join(task.columns)}"
            ) from error


def _demo_folder(task: str, style: str) -> Path:
    from vlmamba.data.demo.benchmarks import demo_benchmark

    return Path(demo_benchmark(task, style))


def _folder_files(root: Path, task: Benchmark) -> list[Path]:
    """The files of a task in a folder, best-named layout first."""
    for name in (f"{task.name}.parquet", f"{task.name}.jsonl"):
        if (root / name).is_file():
            return [root / name]
    names = {task.name.lower(), task.hub.path.split("/")[-1].lower()}
    for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir())):
        if folder.resolve().name.lower() in names:
            files = sorted(folder.rglob("*.parquet")) or sorted(folder.glob("*.jsonl"))
            if files:
                return _of_split(files, task)
    return []


def _of_split(files: list[Path], task: Benchmark) -> list[Path]:
    """The files of the published config and split, where file names tell them apart."""
    if task.hub.name:
        files = [f for f in files if task.hub.name in f.parts] or files
    split = task.hub.split
    return [f for f in files if f.stem == split or f.stem.startswith(f"{split}-")] or files


def _load_folder(root: Path, task: Benchmark) -> datasets.Dataset:
    files = _folder_files(root, task)
    if files[0].suffix == ".jsonl":
        return _load_jsonl(files, root, task)
    return _load_parquet(files, root, task)


def _load_parquet(files: Sequence[Path], root: Path, task: Benchmark) -> datasets.Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            columns = pq.read_schema(file).names
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a readable parquet file: {_first(error)}") from error
        _check_columns(columns, task, str(file))
    try:
        rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {files[0]}: {_first(error.__cause__ or error)}") from error
    return _confine_paths(_undecoded(rows, task, str(files[0])), root, task)


def _load_jsonl(files: Sequence[Path], root: Path, task: Benchmark) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    rows: list[dict] = []
    for file in files:
        rows += _read_jsonl(file, task)
    for row in rows:
        image = row.get(task.image_column)
        if isinstance(image, str):
            row[task.image_column] = {"bytes": None, "path": image}
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        table = datasets.Dataset.from_dict({c: [row.get(c) for row in rows] for c in columns})
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{files[0]}: a column mixes types: {_first(error)}") from error
    if not rows:
        return table
    return _confine_paths(_undecoded(table, task, str(files[0])), root, task)


def _read_jsonl(file: Path, task: Benchmark) -> list[dict]:
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} as UTF-8 text: {_first(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number} is not JSON: {_first(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{file} line {number} is not a JSON object")
        _check_columns(list(row), task, f"{file} line {number}")
        rows.append(row)
    return rows


def _load_hub(task: Benchmark) -> datasets.Dataset:
    import datasets

    hub = task.hub
    where = f"--data hub: {hub.path}"
    try:
        rows = datasets.load_dataset(hub.path, hub.name, split=hub.split, revision=hub.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # huggingface_hub's own errors derive from OSError, ValueError or RuntimeError
        raise UserError(
            f"{where} could not be fetched ({_first(error)}); connect to the network, or give a "
            "folder with --data DIR"
        ) from error
    _check_columns(rows.column_names, task, where)
    return _undecoded(rows, task, where)


def _check_columns(columns: Sequence[str], task: Benchmark, where: str) -> None:
    finds_images_itself = type(task).images is not Benchmark.images  # GQA: a second table
    for column in (*task.columns, *(() if finds_images_itself else (task.image_column,))):
        if column not in columns:
            raise UserError(
                f"{where}: no column {column!r} for task {task.name!r} (it has: "
                f"{', '.join(map(str, columns)) or 'none'}); expected: "
                f"{', '.join(dict.fromkeys((*task.columns, task.image_column)))}"
            )


def _undecoded(rows: datasets.Dataset, task: Benchmark, where: str) -> datasets.Dataset:
    """The rows with the image column as {"bytes", "path"}, never decoded by the reader."""
    import datasets
    import pyarrow as pa

    if task.image_column not in rows.column_names:
        return rows
    try:
        return rows.cast_column(task.image_column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
        kind = rows.features[task.image_column]
        raise UserError(
            f"{where}: column {task.image_column!r} holds {kind}, not images"
        ) from error


def _confine_paths(rows: datasets.Dataset, root: Path, task: Benchmark) -> datasets.Dataset:
    """Images stored as paths only, resolved inside the folder they came with."""
    column = task.image_column
    paths_only = column in rows.column_names and any(
        value["bytes"] is None and value["path"] is not None
        for chunk in rows.data.column(column).chunks
        if chunk.field("bytes").null_count
        for value in chunk.to_pylist()
        if value is not None
    )
    if not paths_only:
        return rows

    def resolve(row: dict) -> dict:
        image = row[column]
        if image is None or image["bytes"] is not None:
            return {column: image}
        return {column: {"bytes": None, "path": _inside(root, image["path"])}}

    return rows.map(resolve, features=rows.features)


def _inside(root: Path, name: str) -> str:
    """The image file `name` under `root` or `root/images`; raises UserError if it leads outside."""
    home = root.resolve()
    for base in (home / "images", home):
        path = (base / name).resolve()
        if not path.is_relative_to(home):
            raise UserError(f"image path {name!r} leads out of the data folder {root}; refused")
        if path.is_file():
            return str(path)
    return str(home / name)  # absent: counted as unreadable when its turn comes


def _first(error: BaseException) -> str:
    """The first line of an error, short enough for one line of ours."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
