"""Other people's prediction files: how an answer finds its document, and documents in hub columns.

A benchmark says in `llava` how LLaVA's answers.jsonl is joined with its truth files, in
`vlmevalkit` what VLMEvalKit's rows are in hub columns, in `upload` what its test server or official
evaluator takes, and in `answer_formats` which formats of its own there are.
`harness.scoring.imports` reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tasks.published import Row
from vlmamba_core.errors import UserError

Key = tuple[str, ...]


class Documents(NamedTuple):
    """A benchmark's documents by key, and the key of an answer (question_id, prompt, text)."""

    by_key: dict[Key, Row]
    key_of: Callable[[Row], Key]


class TruthFiles(Protocol):
    """The files given as --truth; every method raises UserError for one that cannot be read."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files."""

    def rows(self, path: Path) -> list[Row]:
        """The rows of one file as they stand."""

    def documents(self) -> list[Row]:
        """The rows of all files in hub columns, without pixels."""

    def published(self) -> list[Row] | None:
        """The rows of the benchmark's own published files; None where the files are others."""


def first_line(prompt: str) -> str:
    """The first line of a prompt: the question, where nothing stands before it."""
    return prompt.split("\n")[0]


def by_question_id(answer: Row) -> Key:
    """The key of an answer whose question_id alone says what was asked."""
    return (str(answer["question_id"]),)


def add(documents: dict[Key, Row], key: Key, document: Row) -> None:
    """Keep a document; one that differs from an earlier one of the same key would replace it."""
    if documents.setdefault(key, document) != document:
        raise UserError(f"--truth has two documents for question {'/'.join(key)!r}")


@dataclass(frozen=True)
class LlavaAnswers:
    """How LLaVA's answers to a benchmark find their documents.

    truth: what --truth takes; None: documents in hub columns, or the published layout.  beside: a
    file of LLaVA's that is wanted with those of the published layout.  join(truth files): the
    documents; None: by `id_column`, read as `identifier` makes it a text; where ids repeat
    `question_in(prompt)` tells the documents apart.  looked_up: the official script looks up
    each document's answer by its id: one serves all documents of that id, the last of several
    counts, and those to other ids are never seen.
    """

    truth: str | None = None
    beside: str | None = None
    id_column: str = "question_id"
    identifier: Callable[[Any], str] = str
    question_in: Callable[[str], str] = first_line
    join: Callable[[TruthFiles], Documents] | None = None
    looked_up: bool = False

    def documents(self, truth: TruthFiles) -> Documents:
        """The documents of the truth files. Raises UserError where two have one key."""
        return self.join(truth) if self.join else self._by_id(truth.documents())

    def _by_id(self, rows: Sequence[Row]) -> Documents:
        if self.looked_up:
            return self._numbered(rows)
        repeated = len({row[self.id_column] for row in rows}) < len(rows)

        def key(identifier: Any, prompt: str) -> Key:
            name = self.identifier(identifier)
            return (name, self.question_in(prompt).strip().lower()) if repeated else (name,)

        documents: dict[Key, Row] = {}
        for row in rows:
            add(documents, key(row[self.id_column], row.get("question", "")), row)
        return Documents(documents, lambda answer: key(answer["question_id"], answer["prompt"]))

    def _numbered(self, rows: Sequence[Row]) -> Documents:
        """By id; a second document of an id is (id, "2"): `served` finds it."""
        documents: dict[Key, Row] = {}
        times: dict[str, int] = {}
        for row in rows:
            name = self.identifier(row[self.id_column])
            times[name] = times.get(name, 0) + 1
            documents[(name,) if times[name] == 1 else (name, str(times[name]))] = row
        return Documents(documents, lambda answer: (self.identifier(answer["question_id"]),))

    def served(self, key: Key, documents: Mapping[Key, Row]) -> Iterator[Key]:
        """The keys of all documents that an answer of this key is to."""
        number = 1
        while key in documents:
            yield key
            number += 1
            key = (key[0], str(number)) if self.looked_up else ()


@dataclass(frozen=True)
class AnswerFormat:
    """A prediction format that one benchmark has.

    description: the file, for messages.  truth: the one file that --truth takes beside it.
    read(content): question id -> columns that its document gets; raises for another file's content.
    """

    description: str
    truth: str
    read: Callable[[Any], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Upload:
    """The file that a benchmark's test server or official evaluator takes.

    It is a list of rows with `id_key` and `answer_key`, or one object, id -> answer.  No `id_key`:
    the rows follow the documents, and `question_key` holds what was asked.  join: how ids find
    their documents, where not as LLaVA's do.  unwrap(content): what of another content is id ->
    answer; None for others.  read(path): documents with answers, of files that hold their truth;
    None for others.  description: the file, for messages, where it is neither list nor object.
    """

    id_key: str = "question_id"
    answer_key: str = "answer"
    question_key: str = ""
    join: LlavaAnswers | None = None
    unwrap: Callable[[Any], Mapping[str, Any] | None] | None = None
    read: Callable[[Path], list[tuple[Row, str]] | None] | None = None
    description: str = ""

    def described(self) -> str:
        """What the file holds, for messages."""
        keys = [key for key in (self.id_key, self.question_key, self.answer_key) if key]
        listed = f"rows of {' and '.join(keys)}"
        return self.description or listed + ", or one object, id -> answer" * bool(self.id_key)

    def answers(self, content: Any) -> list[Row] | None:
        """Rows of question_id, prompt and text as they stand; None for another file's content."""
        unwrapped = self.unwrap(content) if self.unwrap else None
        if unwrapped is None and isinstance(content, Mapping) and self._is_row(content):
            content = [content]  # one line
        if isinstance(content, list):
            if not content or not all(map(self._is_row, content)):
                return None
            return [self._answer(number, row) for number, row in enumerate(content, 1)]
        pairs = content if unwrapped is None else unwrapped
        if not self.id_key or not isinstance(pairs, Mapping):
            return None
        if not any(isinstance(text, str) for text in pairs.values()):
            return None
        return [{"question_id": k, "prompt": "", "text": text} for k, text in pairs.items()]

    def _is_row(self, row: Any) -> bool:
        keys = [key for key in (self.id_key, self.question_key, self.answer_key) if key]
        return isinstance(row, Mapping) and all(key in row for key in keys)

    def _answer(self, number: int, row: Row) -> Row:
        name = row[self.id_key] if self.id_key else number
        prompt = row[self.question_key] if self.question_key else ""
        return {"question_id": name, "prompt": prompt, "text": row[self.answer_key]}
