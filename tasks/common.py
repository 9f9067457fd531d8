"""What every benchmark is: a prompt, a parser and a score, under two named protocols.

`paper` prompts and scores as the published LLaVA-1.5 scripts do, `lmms` as lmms-eval does.
A benchmark is pure Python (no torch): the same object scores a model's run, a prediction file
(`harness.score`) and, through `lmms_eval_functions`, a run of the `lmms-eval` command itself.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Any, Generic, Literal, Self, TypeVar

from tasks.answer_files import AnswerFormat, LlavaAnswers, Upload
from tasks.cells import looks_like_list
from tasks.judged import JudgeModel
from tasks.official import Official
from tasks.published import Layout, Row
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose

PROTOCOLS = ("paper", "lmms")
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."

HAS_IMAGE = "has_image"  # the column that tells it once the image column is gone

Doc = Mapping[str, Any]
T = TypeVar("T")
Unit = Literal["fraction", "points"]


@dataclass(frozen=True)
class Case:
    """One scored answer. `parsed` None: nothing was understood (counted in n_unparsed).

    `score` is a fraction in 0..1, or None where one answer alone has no score.
    `detail` holds what `aggregate` needs beyond the score (JSON-serializable).
    """

    score: float | None
    parsed: str | None
    detail: Any = None


@dataclass(frozen=True)
class Hub:
    """Where the published data lives: data set id, config name, split, pinned revision."""

    path: str
    split: str
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True, order=True)
class PaperColumn:
    """A column of the VL-Mamba paper's tables: its place among the benchmarks, and its heading.

    first_table_only: the other tables are without it.  other: its name in results/paper.csv where
    its figures are of other questions than this benchmark's, so that they stay without company.
    """

    place: int
    heading: str
    first_table_only: bool = False
    other: str = ""


@dataclass(frozen=True)
class PerProtocol(Generic[T]):
    """A setting that the protocols do not share."""

    paper: T
    lmms: T

    def under(self, protocol: str) -> T:
        """The setting under one protocol."""
        return getattr(self, protocol)


@dataclass(frozen=True)
class Report:
    """Scores of a set of answers. `cases` follows `docs`; an excluded row has no case (None)."""

    metrics: dict[str, float]
    cases: list[Case | None]
    n: int
    n_unparsed: int
    excluded: dict[str, int] = field(default_factory=dict)  # reason -> rows left out
    notes: list[str] = field(default_factory=list)  # what a reader of the table must know
    metric_n: dict[str, int] = field(default_factory=dict)  # where a metric is not over all n
    unit: Unit | None = None  # of the metrics, where it is not the benchmark's
    unbounded: frozenset[str] = frozenset()  # metrics whose largest value nobody knows
    no_interval: dict[str, str] = field(default_factory=dict)  # metric -> why it has none


@dataclass(frozen=True)
class PromptOption:
    """A choice that a prompt leaves open, such as where TextVQA's OCR tokens stand.

    values: what may be chosen; default: what each protocol takes.
    """

    values: tuple[str, ...]
    default: PerProtocol[str]
    help: str


PROMPT_OPTIONS = {
    "ocr": PromptOption(
        ("first", "last", "none"),
        PerProtocol(paper="last", lmms="none"),
        "TextVQA's OCR tokens: before the question, behind it (LLaVA-1.5), or left out",
    ),
    "hint": PromptOption(
        ("shown", "none"),
        PerProtocol(paper="shown", lmms="shown"),
        "ScienceQA's context and MMBench's hint: before the question, or left out",
    ),
}


class Benchmark(ABC):
    """A benchmark. Subclasses are stateless; one instance per folder is exported as `task`."""

    prompt_options: tuple[str, ...] = ()  # those of PROMPT_OPTIONS that its prompt has
    _prompt: Mapping[str, str] = {}  # what was chosen of them, see `with_prompt`

    name: str
    size: str = ""  # of the hub's split, for lists: "9,000 questions on 500 images"
    primary_metric: str  # the metric key that tables show
    primary_metric_needs_image: bool = (
        False  # it leaves text-only questions out; so do paired tests
    )
    metrics: tuple[str, ...]  # metric keys of any full data set, the primary one first
    unit: Unit = "fraction"  # of its metrics: 0..1, or totals (MME)
    columns: tuple[str, ...]  # columns a document must have, besides the image
    list_columns: tuple[str, ...] = ()  # columns that hold a list: of choices, of references...
    text_lists: bool = False  # True: plain text in them is one entry, or names joined by commas
    text_is_no_reference: tuple[
        str, ...
    ] = ()  # those where plain text is a missing reference, counted
    empty_cell: str = ""  # what the hub's copy has where a published table has an empty cell
    table_name: str = ""  # what its published tables are called, where not as the task
    demo: bool = True  # the demo world has rows of it
    published: bool = (
        True  # False: generated, there is no data of it on the hub; `all` leaves it out
    )
    image_column: str = "image"  # a cell holds one image, or a list of them
    more_image_columns: tuple[str, ...] = ()  # of a question with several images
    configs: tuple[str, ...] = ()  # of the hub's repository, where its data are in several
    part: tuple[str, str] | None = None  # (column, value): only rows with this value are asked
    image_hub: Hub | None = None  # a second table, for rows that only name their image...
    image_id_column: str = ""  # ...in this column
    text_only_questions: bool = False  # True: a row without an image is asked as it is
    cluster_columns: tuple[str, ...] = ("image_source", "question_id")
    scored_alone: bool = True  # False: the rows of a cluster make one score (pairs, rotations)
    # what the official script does with a question that has no answer; here it is left out:
    unanswered_wrong_in: str = ""  # the metric that it counts as wrong in
    unanswered_refused: bool = False  # True: a file without it is refused
    hub: Hub
    layout: Layout | None = None  # of the benchmark's own published files
    paper_column: PaperColumn | None = None  # in the VL-Mamba paper's tables
    official: Official | None = None  # lmms-eval's own task, where it needs no judge
    llava = LlavaAnswers()  # how LLaVA's answers find their documents
    upload = Upload()  # what its test server or official evaluator takes
    submitted: bool = False  # True: answers are as they were uploaded, see `of_uploads`
    answer_formats: Mapping[str, AnswerFormat] = {}  # prediction formats of this benchmark alone
    judged: bool = False  # True: a judge model grades or reads answers, see `evaluate_judged`
    token_limits: PerProtocol[int]  # how long an answer may get
    stops = PerProtocol[tuple[str, ...]](paper=(), lmms=("\n\n",))  # see `stop`
    submission_suffix: str | None = None  # of the file that the benchmark's test server takes
    submission_split: str | None = None  # whose every question that file must have; None: as asked
    submission_column: str = "question_id"  # what that file knows a question by

    @property
    def description(self) -> str:
        """What the benchmark is, in a line: the first one of its module."""
        return (sys.modules[type(self).__module__].__doc__ or self.name).strip().split("\n")[0]

    @abstractmethod
    def prompt(self, doc: Doc, protocol: str) -> str:
        """The text after "<image>\\n" in the user's turn."""

    @abstractmethod
    def reference(self, doc: Doc) -> Any:
        """The reference answer(s), JSON-serializable; None where it is hidden."""

    @abstractmethod
    def score_case(self, doc: Doc, prediction: str, protocol: str) -> Case:
        """Parse and score one answer, which `evaluate` has stripped. Must raise on no string."""

    @abstractmethod
    def aggregate(
        self, docs: Sequence[Doc], cases: Sequence[Case], protocol: str
    ) -> dict[str, float]:
        """Metrics of the given (document, case) pairs, which may repeat (bootstrap).

        A metric that these documents say nothing about (an absent category) is left out.
        """

    def kind(self, doc: Doc, case: Case) -> Hashable | None:
        """All that `aggregate` looks at in a row; None where that is more than rows can tell alone.

        Metrics then follow from how many rows of each kind there are, see `aggregate_kinds`.
        """
        metrics = self.means_over(doc)
        return None if metrics is None else (case.score or 0.0, metrics)

    def means_over(self, doc: Doc) -> tuple[str, ...] | None:
        """The metrics that are the mean score of rows such as this one; None: not all are means."""
        return None

    def aggregate_kinds(self, counts: Mapping[Any, int], protocol: str) -> dict[str, float]:
        """`aggregate` of so many rows of each `kind`: means, unless a benchmark has its own."""
        sums: dict[str, list[float]] = {}
        rows: Counter[str] = Counter()
        for (score, metrics), count in counts.items():
            for metric in metrics:
                sums.setdefault(metric, []).append(score * count)
                rows[metric] += count
        return {metric: fsum(parts) / rows[metric] for metric, parts in sums.items()}

    def with_prompt(self, **chosen: str | None) -> Self:
        """This benchmark under the given prompt options; None, or another task's: no choice.

        Raises UserError for an unknown value.
        """
        own = {k: v for k, v in chosen.items() if v is not None and k in self.prompt_options}
        if not own:
            return self
        for name, value in own.items():
            own[name] = choose(f"value of --{name}", value, PROMPT_OPTIONS[name].values)
        changed = copy.copy(self)
        changed._prompt = own
        return changed

    def of_uploads(self) -> Self:
        """This benchmark for answers from uploads: what LLaVA does to an answer before it uploads
        it (normalization, under `paper`) has been done, and twice may differ from once."""
        changed = copy.copy(self)
        changed.submitted = True
        return changed

    def prompt_choice(self, name: str, protocol: str) -> str:
        """The value of a prompt option: as chosen, else the protocol's."""
        return self._prompt.get(name) or PROMPT_OPTIONS[name].default.under(protocol)

    def prompt_choices(self, protocol: str) -> dict[str, str]:
        """Every prompt option with its value, for a record."""
        return {name: self.prompt_choice(name, protocol) for name in self.prompt_options}

    def max_new_tokens(self, protocol: str) -> int:
        """Answer length limit in tokens."""
        return self.token_limits.under(protocol)

    def stop(self, protocol: str) -> tuple[str, ...]:
        """Strings that end an answer (the answer is cut before the first one)."""
        return self.stops.under(protocol)

    def cluster(self, doc: Doc) -> str:
        """Key of the resampling unit for intervals: questions that share it are not independent."""
        named = (doc[c] for c in self.cluster_columns if not is_blank(doc.get(c)))
        return str(next(named, id(doc)))

    def maximum(self, metric: str, metrics: Iterable[str]) -> float:
        """The largest possible value of a metric, among `metrics`; the smallest is always 0."""
        return 1.0

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        """Row index -> reason, for rows that cannot be scored (half a pair, missing truth...)."""
        return {}

    def metric_n(self, docs: Sequence[Doc]) -> dict[str, int]:
        """How many questions a metric is over, for those that are not over all scored documents."""
        return {}

    def notes(self, docs: Sequence[Doc], protocol: str) -> list[str]:
        """Sentences that belong under the table, such as which categories the data lack."""
        return []

    def has_image(self, doc: Doc) -> bool | None:
        """Whether the question comes with an image; None where the document does not tell.

        The column `has_image` tells, else the image column itself while it is there.
        """
        if not is_blank(doc.get(HAS_IMAGE)):
            return _is_yes(doc[HAS_IMAGE])
        return not is_blank(doc[self.image_column]) if self.image_column in doc else None

    def without_image(self, doc: Doc) -> dict[str, Any]:
        """The document as a record keeps it: every column but the pixels.

        Where questions may lack an image, `has_image` keeps what the dropped column tells.
        """
        kept = {key: value for key, value in doc.items() if key not in self.image_columns}
        told = self.has_image(doc) if self.text_only_questions else None
        return kept if told is None else kept | {HAS_IMAGE: told}

    def asks(self, doc: Doc) -> bool:
        """Whether the row belongs to the benchmark's `part`; a row that does not tell does."""
        return self.part is None or doc.get(self.part[0], self.part[1]) == self.part[1]

    def awaits(self, doc: Doc) -> bool:
        """Whether a file of answers lacks something without an answer to this row."""
        return self.asks(doc)

    def rows_of_part(self, rows: Any) -> Any:
        """Those rows of a `datasets.Dataset` that belong to the benchmark's `part`."""
        if self.part is None or self.part[0] not in rows.column_names:
            return rows
        column, value = self.part
        kept = [row for row, cell in enumerate(rows[column]) if cell == value]
        return rows if len(kept) == len(rows) else rows.select(kept)

    def process_docs(self, rows: Any) -> Any:
        """A `datasets.Dataset` with all that scoring asks of a row, before its images are dropped.

        lmms-eval scores documents without their image columns, so `has_image` is written down here,
        from the images that there are: a column of that name in the data does not count.
        """
        rows = self.rows_of_part(rows)
        if not self.text_only_questions or self.image_column not in rows.column_names:
            return rows
        images = rows.select_columns(self.image_column).with_format("arrow")
        told = [there for b in images.iter(256) for there in b.column(0).is_valid().to_pylist()]
        stored = [HAS_IMAGE] if HAS_IMAGE in rows.column_names else []
        return rows.remove_columns(stored).add_column(HAS_IMAGE, told)

    def vlmevalkit(self, row: Row) -> list[Row]:
        """The documents, in hub columns, that a row of VLMEvalKit's prediction file answers."""
        return [row]

    def asked(self, doc: Doc) -> list[str]:
        """What of a document a prompt shows, whatever stands around it and whose prompt it is."""
        return [str(doc.get("question") or "")]

    def submission_id(self, doc: Doc) -> Any:
        """What the submission file knows a question by. Raises UserError where the row has none."""
        found = doc.get(self.submission_column)
        if found is None or found == "":
            raise UserError(
                f"{self.name}: a row has no {self.submission_column}, which the test server needs "
                f"(it has: {', '.join(map(str, doc)) or 'nothing'})"
            )
        return found

    def submission(self, docs: Sequence[Doc], predictions: Sequence[str]) -> Any:
        """What the benchmark's test server takes: JSON content, or a list of rows for a sheet.

        Raises UserError for a benchmark that has no server, which is the default.
        """
        raise UserError(f"task {self.name!r} has no test server and no submission file")

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Every column with images."""
        return (self.image_column, *self.more_image_columns)

    def image_cells(self, doc: Doc, protocol: str) -> list:
        """The question's images as the document holds them, in the order in which they are shown.

        None stands for one that is asked about but absent; empty for a text-only document.
        """
        cell = doc.get(self.image_column)
        return list(cell) if isinstance(cell, list) else [] if cell is None else [cell]

    def images(self, doc: Doc, protocol: str) -> list:
        """The document's PIL images, RGB; empty for a text-only document."""
        cells = self.image_cells(doc, protocol)
        return [image.convert("RGB") for image in cells if image is not None]

    def evaluate(self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str) -> Report:
        """Score all answers; rows that `exclude` names are left out and counted by reason.

        Raises UserError for an unknown protocol or a document without a required column.
        """
        protocol = choose_protocol(protocol)
        check_columns(self, docs)
        reasons = self.exclude(docs, protocol)
        cases: list[Case | None] = [
            None if row in reasons else self.score_case(doc, stored(prediction), protocol)
            for row, (doc, prediction) in enumerate(zip(docs, predictions, strict=True))
        ]
        kept = [(doc, case) for doc, case in zip(docs, cases, strict=True) if case is not None]
        kept_docs = [doc for doc, _ in kept]
        return Report(
            metrics=self.aggregate(kept_docs, [c for _, c in kept], protocol) if kept else {},
            cases=cases,
            n=len(kept),
            n_unparsed=sum(case.parsed is None for _, case in kept),
            excluded=_count(reasons.values()),
            notes=self.notes(kept_docs, protocol),
            metric_n=self.metric_n(kept_docs),
        )

    def evaluate_judged(
        self, docs: Sequence[Doc], predictions: Sequence[str], protocol: str, judge: JudgeModel
    ) -> Report:
        """`evaluate` with the judge's help, where `judged`."""
        return self.evaluate(docs, predictions, protocol)


def stored(answer: str) -> str:
    """An answer as the scorers get it, from a model or from a file: without space at its ends.

    LLaVA's generation scripts (model_vqa_loader.py, model_vqa_science.py) strip an answer before
    they store it, and lmms-eval strips it before it calls a task's `process_results`.
    """
    return answer.strip()


def choose_protocol(protocol: str) -> str:
    """The protocol of that name, in any case. Raises UserError unless there is one."""
    return choose("protocol", protocol, PROTOCOLS)


def check_columns(task: Benchmark, docs: Sequence[Doc]) -> None:
    """Raise UserError naming the first row and column that a document lacks."""
    for row, doc in enumerate(docs):
        for column in task.columns:
            if column not in doc:
                raise UserError(
                    f"{task.name}: row {row + 1} has no column {column!r} (it has: "
                    f"{', '.join(map(str, doc)) or 'none'}); expected columns: "
                    f"{', '.join(task.columns)}"
                )
        refuse_texts(task, doc, f"{task.name}: row {row + 1}")


def refuse_texts(task: Benchmark, doc: Doc, where: str) -> None:
    """Raise UserError, which starts with `where`, for a column that `check_lists` cannot take."""
    for column in task.list_columns:
        try:
            check_lists(task, {column: doc.get(column)})
        except TypeError as error:
            raise UserError(
                f"{where}: column {column!r} is {doc[column]!r:.60}; {error}"
            ) from error


def is_blank(cell: Any) -> bool:
    """True for a cell that holds nothing: None, NaN, "" or the text "nan" of a written table."""
    return cell is None or (isinstance(cell, float) and cell != cell) or cell in ("", "nan")


def _is_yes(cell: Any) -> bool:
    """A cell as true or false; a table's cells are text, in which "False" and "0" are false."""
    if isinstance(cell, str):
        return cell.strip().lower() not in ("false", "0", "0.0", "no", "none")
    return bool(cell)


def check_lists(task: Benchmark, doc: Doc) -> None:
    """Raise TypeError where text stands in place of a list: its letters would be the entries."""
    for column in task.list_columns:
        value = doc.get(column)
        if isinstance(value, str) and value.strip():
            alone = task.text_lists or column in task.text_is_no_reference
            if not alone or looks_like_list(value):
                raise TypeError("expected a list, not text")


def _count(values: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def lmms_eval_functions(task: Benchmark) -> dict[str, Callable]:
    """The module-level functions that a task's YAML names with `!function tasks.<name>.<key>`.

    For each protocol p: `p_doc_to_text`, `p_doc_to_visual`, `p_process_results` and one aggregation
    `p_<metric>` per entry of `task.metrics` (slashes become underscores); and `doc_to_target`,
    `process_docs`.  A folder's `__init__` puts them in its namespace with
    `globals().update(lmms_eval_functions(task))`.
    """
    functions: dict[str, Callable] = {
        "doc_to_target": task.reference,
        "process_docs": task.process_docs,
    }
    for protocol in PROTOCOLS:
        functions |= _protocol_functions(task, protocol)
    return functions


def _protocol_functions(task: Benchmark, protocol: str) -> dict[str, Callable]:
    def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Mapping | None = None) -> str:
        refuse_texts(task, doc, task.name)
        return task.prompt(doc, protocol)

    def doc_to_visual(doc: Doc) -> list:
        return task.images(doc, protocol)

    def process_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
        item = {"doc": task.without_image(doc), "prediction": results[0]}
        return dict.fromkeys(task.metrics, item)

    def aggregation(metric: str) -> Callable[[Sequence[Mapping]], float]:
        def aggregate(items: Sequence[Mapping]) -> float:
            docs = [item["doc"] for item in items]
            predictions = [item["prediction"] for item in items]
            return task.evaluate(docs, predictions, protocol).metrics.get(metric, float("nan"))

        return aggregate

    return {
        f"{protocol}_doc_to_text": doc_to_text,
        f"{protocol}_doc_to_visual": doc_to_visual,
        f"{protocol}_process_results": process_results,
        **{f"{protocol}_{m.replace('/', '_')}": aggregation(m) for m in task.metrics},
    }
