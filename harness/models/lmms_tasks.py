"""lmms-eval's own tasks: as a check of scores, and as benchmarks: `--tasks lmms:ai2d`.

    (task,) = load(["ai2d"], model_name="vlmamba")
    asked = task.questions(source, limit=100)
    report = task.evaluate([question.doc for question in asked], answers, "lmms")

Documents, prompts, choices, generation limits, filters, `process_results` and aggregations are
lmms-eval's, called as its evaluator calls them.  A row over which one of them fails is counted.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import inspect
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lmms_eval.api.metrics  # noqa: F401 - registers the metrics that task files name
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from loguru import logger
from tqdm import tqdm

from harness.data import folder
from harness.data.images import UnreadableImage
from harness.data.questions import NO_IMAGE, OwnRows, Question
from harness.data.sources import Source, commit
from harness.models import lmms_values, ranks
from harness.models.base import likelihood
from harness.models.lmms_rows import Rows, decoded, image_columns, loss, undecoded, with_pictures
from harness.models.lmms_values import Values
from tasks.common import Case, Doc, Hub, Report
from vlmamba_core.errors import UserError, first_line, one_line
from vlmamba_core.names import match

PREFIX = "lmms:"
ROW = "row"  # of a document: its number, by which lmms-eval's own document is found
GENERATED, SCORED = ("generate_until",), ("multiple_choice", "loglikelihood")
ROWS_TO_TRY = 10  # for the one that lmms-eval looks at when it makes a task: the first may be odd
PATIENCE_S = 10.0
STILL_SCORING = (
    "lmms-eval is still scoring; a task that asks a judge waits for it again and again, and takes "
    "its address and key from the environment (see lmms-eval's README of the task)"
)
NEAREST = 8  # names in the error of an unknown task


class OwnTask(ConfigurableTask):
    """A task of lmms-eval's own over rows that are already loaded.

    config: as its file says.  tables: split -> rows, their pictures undecoded.
    """

    def __init__(
        self, config: Mapping[str, Any], tables: Mapping[str, Any], model_name: str = "vlmamba"
    ) -> None:
        self._tables = datasets.DatasetDict(tables)
        super().__init__(config=copy.deepcopy(dict(config)), model_name=model_name)

    @classmethod
    def of_file(cls, file: str, rows: Sequence[Mapping[str, Any]]) -> OwnTask:
        """The task in a file below lmms-eval's `tasks`; of the rows its class sees the first."""
        config = load_yaml_config(str(Path(str(files("lmms_eval"))) / "tasks" / file), mode="full")
        return cls(config, {config["test_split"]: datasets.Dataset.from_list(list(rows[:1]))})

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """lmms-eval's hook for getting the data."""
        self.dataset = self.dataset_no_image = self._tables
        if not self.config.process_results_use_image:
            self.dataset_no_image = datasets.DatasetDict(
                {split: t.remove_columns(image_columns(t)) for split, t in self._tables.items()}
            )

    def use(self, tables: Mapping[str, Any]) -> None:
        """Go on with other rows of the same columns."""
        self._tables = datasets.DatasetDict(tables)
        self.download()

    def results(self, row: Mapping[str, Any], answers: Sequence[Any]) -> Mapping[str, Any]:
        """What `process_results` makes of a row's answers."""
        # Their decorator tries five times, with seconds between, what can only fail again.
        return inspect.unwrap(type(self).process_results)(self, row, list(answers))

    def filtered(self, instances: Sequence[Instance], row: Mapping[str, Any]) -> list[str]:
        """Apply the task's filters to the answers (`resps`) to a row; the filters' names."""
        for ensemble in self._filters:
            ensemble.apply(list(instances), [row] * len(instances))
        return list(instances[0].filtered_resps)

    def value(self, metric: str, items: Sequence[Any], keep: Path | None = None) -> Any:
        """What the metric's aggregation makes of the items that `results` gave.

        keep: the folder for files that it may write; None: nobody wants them.
        """
        aggregate = self.aggregation()[metric]
        if "args" not in inspect.signature(aggregate).parameters:
            return aggregate(list(items))
        if keep is not None:
            return aggregate(list(items), args=SimpleNamespace(output_path=str(keep)))
        with tempfile.TemporaryDirectory() as nowhere:
            return aggregate(list(items), args=SimpleNamespace(output_path=nowhere))


class LmmsTask(OwnRows):
    """A task of lmms-eval as a benchmark; its rows come with `questions`.

    config: as its file says.  model_name: whose version of the prompts is taken.
    """

    columns, metrics, primary_metric = (), (), ""
    scored_alone = False

    def __init__(self, name: str, config: Mapping[str, Any], model_name: str) -> None:
        self.name, self.task_name = f"lmms-{name}", name
        self.config, self.model_name = config, model_name
        split = config.get("test_split") or config.get("validation_split")
        self.hub = Hub(str(config.get("dataset_path")), str(split), config.get("dataset_name"))
        kind = config.get("output_type", "generate_until")
        self.by_likelihood = kind in SCORED
        refused = ""
        if kind not in (*GENERATED, *SCORED):
            refused = f"is of lmms-eval's kind {kind}, which is not asked here"
        elif config.get("reasoning_tags") or config.get("auto_strip_thinking"):
            refused = "has reasoning cut out of its answers, which is not done here"
        if refused:
            raise UserError(
                f"{PREFIX}{name} {refused}; use lmms-eval --model vlmamba --tasks {name}"
            )
        self._files: Path | None = None
        self._revision: str | None = None

    def questions(self, source: Source, limit: int | None) -> list[Question]:
        """The first rows as questions with their requests. Raises UserError without data."""
        with quietly():
            self.task = self._open(source)
            table = self.task.eval_docs_no_media
            self.row = functools.lru_cache(maxsize=1)(
                lambda number: {name: decoded(value, []) for name, value in table[number].items()}
            )
            rows = Rows(lambda: {self.task.config.task: self.task.dataset})
            numbers = range(min(len(table), limit or len(table)))
            shown = tqdm(numbers, desc=f"{self.name}: reading", disable=ranks.rank() != 0)
            found = [self._question(number, rows) for number in shown]
        if all(question.image_key is None for question in found):
            why = found[0].trouble if found else "there are none"
            raise UserError(f"{self.name}: none of the {len(found)} rows can be asked: {why}")
        return found

    def described(self, source: Source) -> dict[str, Any]:
        """Where the rows are from, and the versions that decide what is asked."""
        hub = self._hub(source)
        where: dict[str, Any] = {"path": hub.path, "name": hub.name, "split": hub.split}
        if source.root is not None:
            where = {"files": folder.names(self._found(source), source.root)}
        told = self.config.get("metadata") or {}  # a table, or a list of such
        told = told if isinstance(told, Mapping) else dict(told[0])
        own = {"task": self.task_name, "model_name": self.model_name, "task_version": None}
        own["task_version"] = told.get("version")
        return {"source": source.name, **where, "revision": self._revision, "lmms_eval": own}

    def keep_files(self, place: Path) -> None:
        """Let aggregations write their files (submissions) below this folder."""
        self._files = place

    def together(self, answers: Sequence[str]) -> str:
        """The answers to a row's requests as one, which `score_case` takes apart."""
        if self.by_likelihood:
            return f"[{', '.join(answers)}]"
        return answers[0] if len(answers) == 1 else json.dumps(answers, ensure_ascii=False)

    def prompt(self, doc: Doc, protocol: str) -> str:
        """Of the first request to the document."""
        return self._context(self.row(doc[ROW]))

    def reference(self, doc: Doc) -> Any:
        """The task's target, as JSON has it."""
        return json.loads(json.dumps(self.task.doc_to_target(self.row(doc[ROW])), default=str))

    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        """What is read in an answer; in `detail` the task's results by metric.

        Raises whatever the task's own code does.
        """
        row = self.row(doc[ROW])
        answers = self._answers(prediction)
        instances = [
            Instance("", (), number, self._told(doc[ROW]), resps=given)
            for number, given in enumerate(answers)
        ]
        results: dict[str, Any] = {}
        filters = self.task.filtered(instances, row)
        known = self.task.aggregation()
        for name in filters:
            given = [instance.filtered_resps[name] for instance in instances]
            label = f" ({name})" if len(filters) > 1 else ""
            found = self.task.results(row, given)
            results |= {f"{m}{label}": item for m, item in found.items() if m in known}
        read = instances[0].filtered_resps[filters[0]]
        if self.by_likelihood:
            read = self._likeliest(row, [given[0][0] for given in answers])
        return Case(None, read if isinstance(read, str) else prediction, results)

    def evaluate(self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str) -> Report:
        """Every row's results, aggregated; a row over which the task fails is counted."""
        read: list[Case | None] = []
        wrong: Counter[str] = Counter()
        with quietly(), told_after(PATIENCE_S, f"{self.name}: {STILL_SCORING}"):
            for doc, prediction in zip(docs, predictions, strict=True):
                try:
                    read.append(self.score_case(doc, prediction, protocol))
                except Exception as error:  # the task's own code, on whatever a model says
                    why = one_line(f"{type(error).__name__}: {first_line(error)}")
                    wrong[f"not scored by lmms-eval: {why}"] += 1
                    read.append(None)
            results = [case.detail for case in read if case is not None]
            values = Values.of(results, functools.partial(self._value, self._files))
        if self._files is not None and (self._files / "submissions").is_dir():
            values.notes.append(f"lmms-eval's own files are in {self._files / 'submissions'}")
        scored = iter(values.cases())
        cases = [
            None if case is None else Case((own := next(scored)).score, case.parsed, own.detail)
            for case in read
        ]
        return Report(
            metrics=values.totals,
            cases=cases,
            n=len(results),
            n_unparsed=0,
            excluded=dict(wrong),
            notes=[f"as lmms-eval {version('lmms-eval')} asks and scores it", *values.notes],
            metric_n=values.counts,
            unit=values.unit,
            unbounded=values.unbounded,
            no_interval=values.no_interval,
        )

    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        """The metrics of some cases of one `evaluate`."""
        with quietly():
            return lmms_values.total(cases, functools.partial(self._value, None))

    def _value(self, keep: Path | None, label: str, items: list[Any]) -> Any:
        return self.task.value(label.partition(" (")[0], items, keep)

    def _answers(self, prediction: str) -> list[list[Any]]:
        """The answers to each of a row's instances, as lmms-eval keeps them."""
        if self.by_likelihood:
            return [[loss(*likelihood(json.dumps(one)))] for one in json.loads(prediction)]
        repeats = self.task.config.repeats
        return [[prediction] if repeats == 1 else json.loads(prediction)]

    def _likeliest(self, row: Mapping[str, Any], losses: Sequence[float]) -> str | None:
        """The choice of the least loss; None where the task has one continuation and no choice."""
        if self.task.config.doc_to_choice is None:
            return None
        choices = self.task.doc_to_choice(row)
        own = losses[:: len(losses) // len(choices)]  # between them, losses without the question
        return str(choices[own.index(min(own))])

    def _context(self, row: Mapping[str, Any]) -> str:
        return self.task.fewshot_context(row, self.task.config.num_fewshot or 0)

    def _told(self, number: int) -> dict[str, Any]:
        config = self.task.config
        own = {"task": config.task, "doc_id": number, "repeats": config.repeats}
        return {**own, "split": config.test_split or config.validation_split}

    def _question(self, number: int, rows: Rows) -> Question:
        doc: dict[str, Any] = {ROW: number}
        try:
            row = self.row(number)
            told = {"metadata": self._told(number)}
            made = self.task.construct_requests(number, self._context(row), **told)
            made = sorted(made if isinstance(made, list) else [made], key=lambda one: one.idx)
            request = rows.scored if self.by_likelihood else rows.request
            asked = [replace(request(one), task=self.name, row=number) for one in made]
            reference = self.reference(doc)
        except UnreadableImage as error:
            return Question(self, number, doc, "", None, image_key=None, trouble=str(error))
        except Exception as error:  # the task's own code raises whatever a row makes it
            why = one_line(f"{type(error).__name__}: {first_line(error)}")
            return Question(
                self, number, doc, "", None, image_key=None, trouble=why, refusal="cannot be asked"
            )
        votes = range(self.task.config.repeats)
        asked = [replace(request, vote=vote) for request in asked for vote in votes]
        key = asked[0].image_key
        doc["image_source"] = key or f"row {number}"
        return Question(
            self, number, doc, asked[0].prompt, reference, (), key or NO_IMAGE, requests=asked
        )

    def _hub(self, source: Source) -> Hub:
        return source.hub(self)

    def _found(self, source: Source) -> list[Path]:
        """The task's files in the source's folder, by lmms-eval's name of it or its data's."""
        named, root = copy.copy(self), source.root
        assert root is not None
        for named.name in (self.task_name, self.hub.path.split("/")[-1]):
            if found := folder.find(root, named, self._hub(source)):
                return found
        return []

    def _open(self, source: Source) -> OwnTask:
        """The task over its rows. Raises UserError where it cannot be made of any of the first."""
        config, hub = dict(self.config), self._hub(source)
        config |= {"dataset_path": hub.path, "validation_split": None, "test_split": hub.split}
        if not config.get("num_fewshot"):  # its class reads them all the same
            config = {name: v for name, v in config.items() if not name.startswith("fewshot_")}
        table = self._fetched(hub) if source.root is None else self._local(source)
        trouble: Exception | None = None
        if process := config.pop("process_docs", None):
            try:
                table = _prepared(process, table)
            except Exception as error:  # the task's own code, over rows that it may not be made for
                trouble, table = error, table.select([])
        for first in range(min(len(table), ROWS_TO_TRY)):
            try:  # its class tries its functions on the first row
                rows = table.select(range(first, len(table)))
                task = OwnTask(config, {hub.split: rows}, self.model_name)
            except Exception as error:
                trouble = trouble or error
                continue
            task.use({hub.split: table})
            return task
        why = one_line(f"{type(trouble).__name__}: {first_line(trouble)}") if trouble else "no rows"
        raise UserError(
            f"{PREFIX}{self.task_name} cannot be made of the rows of {source.name}: {why}"
        )

    def _local(self, source: Source) -> datasets.Dataset:
        root, files_ = source.root, self._found(source)
        assert root is not None
        if not files_:
            raise UserError(
                f"no data for {PREFIX}{self.task_name} in {root}: expected "
                f"{self.task_name}.parquet, {self.task_name}/*.parquet or a copy of "
                f"{self.hub.path}; found {folder.whats_there(root)}"
            )
        return folder.load_unknown(files_, root, self)

    def _fetched(self, hub: Hub) -> datasets.Dataset:
        kwargs = dict(self.config.get("dataset_kwargs") or {})
        if kwargs.get("token") is True:  # a stored one is used anyway, and many are public
            del kwargs["token"]
        try:
            if kwargs.pop("load_from_disk", False):
                return undecoded(datasets.load_from_disk(hub.path)[hub.split])
            found = datasets.load_dataset(
                hub.path, hub.name, split=hub.split, revision=hub.revision, **kwargs
            )
        except (
            datasets.exceptions.DatasetsError,
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            KeyError,
        ) as error:
            # huggingface_hub's own errors derive from OSError, ValueError or RuntimeError
            raise UserError(
                f"{PREFIX}{self.task_name}: {hub.path} could not be fetched ({first_line(error)}); "
                f"connect to the network, or give a folder that has {self.task_name}.parquet with "
                "--data DIR"
            ) from error
        self._revision = commit(found) or hub.revision
        return undecoded(found)


def _prepared(process: Callable, table: datasets.Dataset) -> datasets.Dataset:
    """The rows after a task's own preparation, which is shown pictures only where it needs them."""
    try:
        return undecoded(process(table))
    except Exception:  # a broken picture would end what decodes them all
        return undecoded(process(with_pictures(table, datasets.Image())))


def load(names: Sequence[str], model_name: str) -> list[LmmsTask]:
    """The tasks of lmms-eval that are called so. Raises UserError with the nearest names."""
    with quietly():
        return [_load(name, _known(), model_name) for name in names]


@functools.cache
def _known() -> TaskManager:
    """lmms-eval's index of its tasks, which takes seconds to make."""
    return TaskManager()


def _load(name: str, known: TaskManager, model_name: str) -> LmmsTask:
    if not name:
        raise UserError(f"--tasks {PREFIX} names no task; expected {PREFIX}NAME")
    name = match(name, known.task_index) or name
    if name not in known.task_index:
        near = difflib.get_close_matches(name, known.all_subtasks, NEAREST, cutoff=0.0)
        raise UserError(f"lmms-eval has no task {name!r}; nearest: {', '.join(near)}")
    entry = known.task_index[name]
    if entry["type"] in ("group", "tag"):
        inside = entry["task"]
        if inside == -1:
            inside = load_yaml_config(entry["yaml_path"], mode="simple")["task"]
        parts = [one for one in inside if isinstance(one, str)]
        raise UserError(
            f"{PREFIX}{name} is a {entry['type']} of tasks; name those to run: "
            + ",".join(f"{PREFIX}{part}" for part in parts)
        )
    if entry["type"] != "task":
        raise UserError(f"{PREFIX}{name} is a class of its own, which only lmms-eval can run")
    try:
        config = load_yaml_config(entry["yaml_path"], mode="full")
    except Exception as error:  # the task's module is imported: whatever it needs and is not there
        why = one_line(f"{type(error).__name__}: {first_line(error)}")
        raise UserError(f"{PREFIX}{name} cannot be loaded: {why}") from error
    return LmmsTask(name, config, model_name)


@contextlib.contextmanager
def told_after(seconds: float, line: str) -> Iterator[None]:
    """Print the line where what is inside takes longer."""
    timer = threading.Timer(seconds, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what lmms-eval and its tasks print and log, under whatever module names."""
    datasets.disable_progress_bars()
    logger.disable("")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logger.enable("")
