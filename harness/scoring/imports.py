"""Other people's prediction files as rows that `harness.score` can score.

    rows, missing = load("llava", task, Path("answers.jsonl"), [Path("questions.jsonl"), ...])

Formats: `llava` (answers.jsonl), `vlmevalkit` (the .xlsx or .tsv it writes beside the scores),
`lmms-eval` (samples_TASK.jsonl), `upload` (what a test server or official evaluator takes), and
those that a benchmark has of its own, such as MM-Vet's grades. A format that repeats the documents
needs no truth files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import StatisticsError
from typing import Any

import tasks
from harness.data.readers import (
    TABLES,
    Row,
    lists_read,
    read_documents,
    read_json,
    read_rows,
)
from harness.scoring import llava_answers
from harness.scoring.llava_answers import BAD_ROW, Joined, WrongFormat
from tasks.common import Benchmark, check_columns
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import match

LOGGED_IDS = ("question_id", "index", "id", "category")  # what lmms-eval's tasks log of a document
LOGGED_PREFIX = "llava_bench_"  # which its LLaVA-Bench puts in front of a category
Loader = Callable[[Benchmark, Path, Sequence[Path]], tuple[list[Joined], int]]


def load(
    name: str, task: Benchmark, predictions: Path, truth: Sequence[Path] = ()
) -> tuple[list[Joined], int]:
    """Rows of a prediction file in the format `name`, and how many documents have no answer.

    Raises UserError for an unknown format and for files that do not fit it.
    """
    name = match(name, formats()) or name
    if name not in formats():
        raise unknown("prediction format", name, formats())
    try:
        if predictions.is_dir() and name != UPLOAD:
            raise WrongFormat(f"{predictions} is a folder, expected a file")
        if name in FORMATS:
            return FORMATS[name](task, predictions, truth)
        return from_own_format(name, task, predictions, truth)
    except WrongFormat as error:
        raise UserError(f"{error}{hint(task, predictions, name)}") from error


def is_upload(name: str | None) -> bool:
    """Whether a format's name is that of uploads, whose answers are scored as they are."""
    return name is not None and match(name, formats()) == UPLOAD


def from_upload(
    task: Benchmark, predictions: Path, truth: Sequence[Path]
) -> tuple[list[Joined], int]:
    """What the benchmark's test server or official evaluator takes (`Benchmark.upload`)."""
    upload = task.upload
    if upload.read is None:
        how = upload.join or task.llava
        return llava_answers.join(
            task, how, lambda: _upload_answers(task, predictions), predictions, truth
        )
    found = upload.read(predictions)
    if found is None:
        raise WrongFormat(_no_upload(task, predictions))
    if truth:
        raise UserError(f"{task.name}: {predictions} holds its own truth; leave out --truth")
    return [Joined(str(n), doc, answer) for n, (doc, answer) in enumerate(found)], 0


def _no_upload(task: Benchmark, path: Path) -> str:
    return f"{path} is no upload of {task.name}; expected {task.upload.described()}"


def _upload_answers(task: Benchmark, path: Path) -> list[Row]:
    """Rows of question_id, prompt and text. Raises WrongFormat where the file is no upload."""
    rows = task.upload.answers(_content(path))
    if rows is None:
        raise WrongFormat(_no_upload(task, path))
    for number, row in enumerate(rows, 1):
        named = isinstance(row["question_id"], str | int) and isinstance(row["prompt"], str)
        if not named or not isinstance(row["text"], str):
            raise WrongFormat(
                f"{path} answer {number} is {row['text']!r:.40} to {row['question_id']!r:.40}; "
                f"expected {task.upload.described()}, all text"
            )
    return rows


def _content(path: Path) -> Any:
    """The content of a JSON file, or the rows of a table."""
    return read_rows(path) if path.suffix in (*TABLES, ".parquet") else read_json(path)


def hint(task: Benchmark, path: Path, tried: str | None) -> str:
    """What a file looks like that is not of the format `tried`, to end a message with.

    Empty where it looks like nothing known.
    """
    if path.is_dir():
        taken = tried != UPLOAD and task.upload.read is not None and task.upload.read(path)
        return f"; it looks like an upload of {task.name}: --import {UPLOAD}" if taken else ""
    try:
        content = _content(path)
    except UserError:
        return ""
    first = content[0] if isinstance(content, list) and content else content
    if not isinstance(first, Mapping):
        return ""
    found: dict[str | None, str] = dict(_own_formats(task, content))
    found |= {name: what for keys, name, what in LOOKS if first.keys() >= keys}
    if first.keys() >= {*task.columns, "prediction"}:
        found.setdefault(None, "documents with predictions")
    if task.upload.read is None and task.upload.answers(content) is not None:
        found.setdefault(UPLOAD, f"an upload of {task.name}")
    for name, what in found.items():
        if name != tried:
            how = f"--import {name}" if name else "leave out --import"
            return f"; it looks like {what}: {how}"
    return ""


def _own_formats(task: Benchmark, content: Any) -> Iterator[tuple[str, str]]:
    for name, own in task.answer_formats.items():
        try:
            own.read(content)
        except (*BAD_ROW, StatisticsError):
            continue
        yield name, f"a {own.description}"


def from_vlmevalkit(
    task: Benchmark, predictions: Path, truth: Sequence[Path]
) -> tuple[list[Joined], int]:
    """VLMEvalKit repeats its own documents beside the predictions; they are renamed to hub columns.

    A row may stand for several: its POPE file holds each question once, with all its categories.
    """
    # its JSON has the cells of its tables, lists as text too
    rows = lists_read(read_rows(predictions, task.image_columns), task, predictions)
    for row in rows:
        for column in ("index", "prediction"):
            if column not in row:
                raise WrongFormat(
                    f"{predictions}: no column {column!r}, so not a VLMEvalKit prediction file "
                    f"(it has: {', '.join(map(str, row))})"
                )
        if row["prediction"] is None or row["prediction"] != row["prediction"]:
            row["prediction"] = ""  # null and NaN: an empty cell of its spreadsheet, wrong
        if not isinstance(row["prediction"], str):
            raise UserError(
                f"{predictions}: row {row['index']}: prediction is {row['prediction']!r}, "
                "expected the answer's text"
            )
    joined = []
    for row in rows:
        try:
            documents = task.vlmevalkit(row)
        except BAD_ROW as error:
            raise WrongFormat(
                f"{predictions}: row {row['index']} is not a {task.name} row ({error!r})"
            ) from error
        for i, document in enumerate(documents):
            doc = {key: value for key, value in document.items() if key != "prediction"}
            case_id = f"{row['index']}/{i}" if len(documents) > 1 else str(row["index"])
            joined.append(Joined(case_id, doc, row["prediction"]))
    return joined, 0


def from_lmms_eval(
    task: Benchmark, predictions: Path, truth: Sequence[Path]
) -> tuple[list[Joined], int]:
    """lmms-eval logs a document's number and, for this harness's own tasks, the document.

    For its built-in tasks `truth` gives the documents, in the data set's order: each sample's
    prompt and target must be those of the document that its number names.
    """
    samples = read_rows(predictions)
    answers = [_answer_of(sample, predictions, number) for number, sample in enumerate(samples, 1)]
    documents = read_documents(truth, task)
    check_columns(task, documents)
    joined, differing = [], []
    for number, (sample, (doc_id, answer)) in enumerate(zip(samples, answers, strict=True), 1):
        doc = _logged_document(sample)
        if doc is None and not 0 <= doc_id < len(documents):
            raise UserError(
                f"{predictions} line {number}: no document {doc_id}; give the data set's files, "
                f"in order, with --truth (got {len(documents)} documents)"
            )
        if doc is None and (why := _disagreement(sample, documents[doc_id], task)):
            differing.append(f"doc_id {doc_id}: {why}")
        joined.append(
            Joined(str(doc_id), documents[doc_id] if doc is None else doc, answer, doc_id)
        )
    if differing:
        raise UserError(
            f"{predictions}: {len(differing)} of {len(samples)} samples do not belong to the "
            f"documents that --truth has in their places ({differing[0]}); give the very files of "
            "the split that was evaluated, in their order"
        )
    answered = {row.row for row in joined}
    return joined, sum(task.asks(doc) for n, doc in enumerate(documents) if n not in answered)


def _answer_of(sample: Row, path: Path, number: int) -> tuple[int, str]:
    """The document's number and the answer. Raises WrongFormat for a row without them."""
    doc_id, answer = sample.get("doc_id"), _first_text(sample.get("filtered_resps"))
    if type(doc_id) is not int or answer is None:
        raise WrongFormat(
            f"{path} line {number} has no doc_id or filtered_resps, so is not a sample "
            "of lmms-eval (log them with --log_samples)"
        )
    return doc_id, answer


def _disagreement(sample: Row, doc: Row, task: Benchmark) -> str:
    """In what a sample is not its document's, by prompt, target and logged ids; empty if it is."""
    prompt, target = _prompt_of(sample), sample.get("target")
    if prompt is None and target is None:
        return "it has neither target nor input to tell"
    for text in _asked(task, doc) if prompt is not None else ():
        if _bare(text) not in _bare(str(prompt)):
            return f"its prompt is {prompt!r:.60}, the document has {text!r:.60}"
    # a column that the data set lacks is logged by its name; a hidden truth says nothing
    if target not in (None, "answer") and task.reference(doc) is not None:
        known = [doc.get("answer"), task.reference(doc)]
        if _bare(str(target)) not in {_bare(str(value)) for value in known}:
            return f"its target is {target!r:.60}, the document's {known[0]!r:.60}"
    for logged in (value for value in sample.values() if isinstance(value, dict)):
        for name in LOGGED_IDS:
            told = str(logged.get(name)).removeprefix(LOGGED_PREFIX)
            if name in logged and name in doc and told != str(doc[name]):
                return f"its {name} is {logged[name]!r:.60}, the document's {doc[name]!r:.60}"
    return ""


def _asked(task: Benchmark, doc: Row) -> list[str]:
    """What of a document every prompt of its task shows, whatever stands around it.

    lmms-eval's prompts differ by model in what comes before and after.
    """
    own = _bare(task.prompt(doc, "lmms"))  # a caption's does not ask a document's question
    return [text for text in task.asked(doc) if _bare(text) in own]


def _prompt_of(sample: Row) -> str | None:
    """The prompt: `input`, or the first of the arguments that older logs hold."""
    if isinstance(sample.get("input"), str):
        return sample["input"]
    return _first_text(sample.get("arguments"))


def _bare(text: str) -> str:
    return " ".join(text.lower().split())


def _first_text(responses: Any) -> str | None:
    """The answer itself; lmms-eval wraps it in one list or two."""
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return responses if isinstance(responses, str) else None


def _logged_document(sample: Row) -> Row | None:
    values = [sample, *(value for value in sample.values() if isinstance(value, dict))]
    return next((value["doc"] for value in values if isinstance(value.get("doc"), dict)), None)


def from_own_format(
    name: str, task: Benchmark, predictions: Path, truth: Sequence[Path]
) -> tuple[list[Joined], int]:
    """A format that one benchmark has: what it says of each question, beside its one truth file."""
    owner = _owners()[name]
    own = owner.answer_formats[name]
    if task.name != owner.name or len(truth) != 1:
        raise UserError(f"{name} are of task {owner.name} and need --truth {own.truth}")
    try:
        found = own.read(read_json(predictions))
    except (*BAD_ROW, StatisticsError) as error:
        raise WrongFormat(f"{predictions} is no {own.description} ({error!r})") from error
    rows = read_documents(truth, task)
    check_columns(task, rows)
    if "question_id" not in rows[0]:
        raise UserError(f"{truth[0]} has no column 'question_id'; expected {own.truth}")
    documents = {doc["question_id"]: doc for doc in rows}
    for question in found:
        if question not in documents:
            raise UserError(f"{predictions}: question {question!r} is not in {truth[0]}")
    joined = [Joined(key, {**documents[key], **columns}, "") for key, columns in found.items()]
    return joined, len(documents) - len(joined)


UPLOAD = "upload"
FORMATS: dict[str, Loader] = {
    "llava": llava_answers.load,
    "vlmevalkit": from_vlmevalkit,
    "lmms-eval": from_lmms_eval,
    UPLOAD: from_upload,
}
# Keys that tell a format, its name (None: no --import), and what it is.
LOOKS: tuple[tuple[frozenset[str], str | None, str], ...] = (
    (frozenset({"question_id", "prompt", "text"}), "llava", "LLaVA's answers"),
    (frozenset({"correct", "incorrect"}), "llava", "what LLaVA's eval_science_qa.py writes"),
    (frozenset({"doc_id", "filtered_resps"}), "lmms-eval", "samples of lmms-eval"),
    (frozenset({"doc_id", "prediction", "parsed"}), None, "answers of a run of harness.run"),
    (frozenset({"index", "prediction"}), "vlmevalkit", "predictions of VLMEvalKit"),
)


def _owners() -> dict[str, Benchmark]:
    """The benchmark that has each format of its own."""
    found = [tasks.load(name) for name in tasks.NAMES]
    return {name: task for task in found for name in task.answer_formats}


def formats() -> list[str]:
    """The names of all formats."""
    return [*FORMATS, *_owners()]
