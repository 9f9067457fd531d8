"""Where a benchmark's rows come from: the demo world, the Hugging Face hub, or a local folder.

    source = Source.parse("hub", split="testdev")
    rows = source.rows(tasks.load("vqav2"))     # a datasets.Dataset, images undecoded
    source.describe(tasks.load("vqav2"), rows)           # data set, split, commit: for the record

The formats of a folder are those of `harness.data.folder`. Finding files (`Source.check`) imports
nothing heavy, so that mistakes are reported at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tasks
from harness.data import folder
from harness.data.folder import check_columns, undecoded
from harness.data.questions import SecondTable, check_usable, or_gap
from tasks.common import Benchmark, Hub
from vlmamba_core.errors import UserError, first_line
from vlmamba_core.names import choose, match

if TYPE_CHECKING:
    import datasets
    import pyarrow

STYLES = ("seen", "heldout", "validation")
DEMO_LABEL = "demo: not comparable with published numbers"
COMMIT = re.compile(r"@([0-9a-f]{40})/")  # in the address of a file that the hub resolved


@dataclass(frozen=True)
class Source:
    """One choice of `--data`. `style` picks the demo's split; `root` is the folder, if any.

    `split`, `dataset` and `revision` replace the task's own ones.
    """

    kind: str  # "demo", "hub" or "folder"
    style: str | None = None
    root: Path | None = None
    split: str | None = None
    dataset: str | None = None
    revision: str | None = None

    @classmethod
    def parse(
        cls,
        data: str,
        style: str | None = None,
        *,
        split: str | None = None,
        dataset: str | None = None,
        revision: str | None = None,
    ) -> Source:
        """The source that the command line's options name. Raises UserError for a bad choice."""
        if style is not None:
            style = choose("style", style, STYLES)
        if not Path(data).exists():
            data = match(data, ("demo", "hub")) or data
        if style is not None and data != "demo":
            raise UserError(f"--style {style} needs --data demo, but --data is {data!r}")
        if data != "hub" and (dataset or revision):
            option = "--data-id" if dataset else "--data-revision"
            raise UserError(f"{option} needs --data hub, but --data is {data!r}")
        if data == "demo":
            if split is not None:
                raise UserError(f"--split {split} needs --data hub or a folder; demo has --style")
            return cls("demo", style=style or "seen")
        if data == "hub":
            return cls("hub", split=split, dataset=dataset, revision=revision)
        try:
            root = Path(data).expanduser()
        except RuntimeError:  # ~NAME of nobody
            root = Path(data)
        if not data or not root.is_dir():
            raise UserError(f"no data folder {data!r}; --data takes demo, hub or a folder")
        return cls("folder", root=root, split=split)

    @property
    def name(self) -> str:
        """A short name for folders and tables."""
        if self.kind == "demo":
            return f"demo-{self.style}"
        name = self.kind if self.root is None else self.root.resolve().name
        return f"{name}-{self.split}" if self.split else name

    @property
    def label(self) -> str | None:
        """What a table of these numbers must say, if anything."""
        return DEMO_LABEL if self.kind == "demo" else None

    def hub(self, task: Benchmark) -> Hub:
        """Where the task's published data is, with this source's own choices."""
        return self._chosen(task.hub)

    def _chosen(self, hub: Hub) -> Hub:
        choices = {"path": self.dataset, "split": self.split, "revision": self.revision}
        return dataclasses.replace(hub, **{name: value for name, value in choices.items() if value})

    def describe(self, task: Benchmark, rows: datasets.Dataset | None = None) -> dict[str, Any]:
        """The settings of a task's data, for the record: which data set, and which version of it.

        rows: as they were loaded, of data on the hub, where they know their commit.
        """
        settings: dict[str, Any] = {"source": self.name}
        if self.root is not None:
            files = folder.find(self.root, task, self.hub(task))
            return settings | {"files": folder.names(files, self.root)}
        if self.kind == "hub":
            hub = self.hub(task)
            version = self._version(hub, rows)
            settings |= {
                "path": hub.path,
                "name": hub.name,
                "split": hub.split,
                "revision": version,
            }
        return settings

    def _version(self, hub: Hub, rows: datasets.Dataset | None) -> str | None:
        if _is_package(hub):
            return _package_version(hub)
        return (commit(rows) if rows is not None else None) or hub.revision

    def has(self, task: Benchmark) -> bool:
        """Whether the source holds the task (for a folder: has files for it)."""
        if self.kind == "demo":
            return task.demo
        if self.kind == "hub":
            return task.published
        return self.root is None or bool(folder.find(self.root, task, self.hub(task)))

    def check(self, task: Benchmark) -> None:
        """Raise UserError when a folder has no files for the task, or the demo or hub no rows."""
        if self.kind == "demo" and not task.demo:
            raise UserError(
                f"the demo has no rows of {task.name}; give --data hub, or a folder that has them"
            )
        if self.kind == "hub" and not task.published:
            raise UserError(
                f"{task.name} is generated, there is no data of it on the hub; give --data demo, "
                "or a folder that has them"
            )
        if self.root is not None and not self.has(task):
            found = folder.whats_there(self.root)
            published = f", or as published {task.layout.description}" if task.layout else ""
            raise UserError(
                f"no data for task {task.name!r} in {self.root}: expected {task.name}.parquet, "
                f"{task.name}.jsonl, {task.name}.csv, {task.name}.tsv, "
                f"{task.name}/*.parquet{published}; "
                f"found {found}"
            )

    def load(self, task: Benchmark, protocol: str) -> datasets.Dataset:
        """The task's rows, images undecoded, after a look at every value.

        Raises UserError as `rows` does, and for values that the task cannot use.
        """
        rows = self.rows(task)
        check_usable(task, rows, protocol)
        return rows if task.text_only_questions else _without_gaps(task, rows)

    def demo_table(self, task: Benchmark) -> pyarrow.Table | None:
        """The demo's rows straight from its file, which is small and needs no checks: `datasets`
        takes a second to load. None for other data.
        """
        if self.kind != "demo":
            return None
        import pyarrow.parquet as pq

        root = _demo_folder(task.name, self.style or "seen")
        files = folder.find(root, task, self.hub(task))
        table = pq.ParquetFile(files[0]).read() if len(files) == 1 else None
        return table if table is not None and task.image_column in table.column_names else None

    def rows(self, task: Benchmark) -> datasets.Dataset:
        """The task's rows, images undecoded and values as they are: `questions.read` checks them.

        Raises UserError for unreadable files, missing columns (named), no rows, or no network.
        """
        import datasets

        datasets.disable_progress_bars()  # the model's bar over questions is the only one
        hub = self.hub(task)
        if self.root is not None:
            rows = folder.load(self.root, task, hub)
        elif self.kind == "hub" and not _is_package(hub):
            rows = _load_hub(task, hub)
        else:
            rows = folder.load(_demo_folder(task.name, self.style or "seen"), task, hub)
        rows = task.rows_of_part(rows)
        if len(rows) == 0:
            raise UserError(f"{task.name}: the data of {self.name} has no rows")
        if task.image_hub and task.image_column not in rows.column_names:
            rows = self._with_images(task, rows, self._chosen(task.image_hub))
        return rows

    def questions(self, task: Benchmark, split: str) -> list[dict[str, Any]]:
        """What a submission knows the questions of another split by: that one column, every row.

        Raises UserError where the source has no such split.
        """
        hub = dataclasses.replace(self, split=split).hub(task)
        column = task.submission_column
        if self.root is None:
            return _stream_hub(hub, column)
        files = folder.find(self.root, task, hub)
        if not files:
            raise UserError(f"no files of split {split!r} in {self.root}")
        if files[0].suffix == ".parquet":
            return folder.read_column(files, column)
        return list(folder.load(self.root, task, hub).select_columns([column]))

    def _with_images(self, task: Benchmark, rows: datasets.Dataset, hub: Hub) -> datasets.Dataset:
        """Rows whose image is looked up in the data set's second table whenever a row is read."""
        if self.root is None:
            images: datasets.Dataset | None = _load_hub(task, hub, ("id", task.image_column))
        else:
            asked = folder.find(self.root, task, self.hub(task))
            images = folder.load_images(self.root, task, hub, asked)
        check_columns(rows.column_names, task, self.name, (task.image_id_column,))
        if images is None:
            raise UserError(
                f"{task.name}: {self.root} has rows without an {task.image_column!r} column and "
                f"no {hub.name}/ folder with the published table of images"
            )
        number = {str(name): row for row, name in enumerate(images["id"])}
        if len(number) < len(images):
            raise UserError(f"{task.name}: {hub.name} has an image id that comes twice")
        named = task.image_id_column
        absent = [name for name in rows[named] if str(name) not in number]
        if absent:
            raise UserError(
                f"{task.name}: {named} {absent[0]!r} (and {len(absent) - 1} more) is not among "
                f"the {len(number)} images of {hub.name}"
            )
        return rows.with_transform(SecondTable(task, images, number))


def _without_gaps(task: Benchmark, rows: datasets.Dataset) -> datasets.Dataset:
    """The rows; where an image is absent from a benchmark without text-only questions, a gap."""
    import datasets

    column = task.image_column
    if not isinstance(rows.features.get(column), datasets.Image):
        return rows
    if not rows.data.column(column).null_count:
        return rows
    return rows.map(lambda row: {column: or_gap(row[column])}, features=rows.features)


def _demo_folder(task: str, style: str) -> Path:
    from vlmamba.demo.benchmarks import demo_benchmark

    return Path(demo_benchmark(task, style))


def _is_package(hub: Hub) -> bool:
    """Whether the data ships in a Python package (easy-VQA), not on the hub."""
    return "/" not in hub.path


def _package_version(hub: Hub) -> str:
    return importlib.metadata.version(hub.path)


def _load_hub(task: Benchmark, hub: Hub, needed: tuple[str, ...] | None = None) -> datasets.Dataset:
    import datasets

    where = f"--data hub: {hub.path}"
    try:
        rows = datasets.load_dataset(hub.path, hub.name, split=hub.split, revision=hub.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # huggingface_hub's own errors derive from OSError, ValueError or RuntimeError
        raise UserError(
            f"{where} could not be fetched ({first_line(error)}); connect to the network, or give "
            "a folder with --data DIR"
        ) from error
    check_columns(rows.column_names, task, where, needed)
    return undecoded(rows, task, where)


def _stream_hub(hub: Hub, column: str) -> list[dict[str, Any]]:
    """One column of a published split, without a download of its images."""
    import datasets

    try:
        rows = datasets.load_dataset(
            hub.path,
            hub.name,
            split=hub.split,
            revision=hub.revision,
            streaming=True,
            columns=[column],
        )
        return list(rows)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"split {hub.split} of {hub.path} could not be read: {first_line(error)}"
        ) from error


def commit(rows: datasets.Dataset) -> str | None:
    """The commit that the hub resolved the revision to, as the addresses of the files tell it."""
    addresses = " ".join(rows.info.download_checksums or {})
    found = COMMIT.search(addresses)
    return found[1] if found else None


def choose_tasks(names: str, source: Source) -> list[Benchmark]:
    """The benchmarks named; `all` means the published ones that the source holds.

    Raises UserError.
    """
    if match(names, ("all",)):
        every = map(tasks.load, tasks.NAMES)
        chosen = [task for task in every if task.published and source.has(task)]
        if not chosen:
            raise UserError(f"{source.root} holds no data of any task: {', '.join(tasks.NAMES)}")
        return chosen
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--tasks is {names!r}; give some of {', '.join(tasks.NAMES)}, or all")
    chosen = list(dict.fromkeys(map(tasks.load, wanted)))
    for task in chosen:
        source.check(task)
    if source.dataset and len(chosen) > 1:
        raise UserError(f"--data-id {source.dataset} is one data set; give one task in --tasks")
    return chosen
