"""LLaVA's training JSON, one record at a time: file -> index of byte offsets -> samples.

The file is a JSON array of
`{"id": ..., "image": "rel/path.jpg", "conversations": [{"from": "human", "value": ...}, ...]}`;
text-only samples lack "image", samples with several images list them.  "patch_words" may say what
is where in an image (`patch_words`).

One pass over the mapped file finds where every record begins and ends, so memory holds 16 bytes
a record, however long the conversations are; records are parsed when they are needed. What cannot
be used raises `SampleError`, whose reason is counted by the caller: nothing is dropped silently.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vlmamba.data import patch_words
from vlmamba.data.patch_words import PatchWords
from vlmamba.data.repetition import repetition
from vlmamba_core.errors import UserError
from vlmamba_core.paths import is_inside
from vlmamba_core.tokens import IMAGE

# A JSON string (possessive: no backtracking over long texts), a bracket, or any other word.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]|[^\s,:"{}\[\]]++', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


class SampleError(Exception):
    """A sample that cannot be trained on; `str(error)` is the reason it is counted under."""


@dataclass(frozen=True)
class Sample:
    """One conversation: alternating human and gpt turns, the last one a gpt turn."""

    id: str
    images: tuple[str, ...]  # paths relative to the image folder
    conversations: list[dict[str, str]]  # {"from": "human" | "gpt", "value": text}
    patch_words: tuple[PatchWords, ...] = ()  # of each image, or of none


class LlavaFile:
    """A LLaVA JSON file as a sequence of `Sample`s.

    `file[i]` reads and parses record i only; it raises SampleError when the record is unusable.
    Readers in other processes share nothing (positional reads), so it can go to data workers.
    records: where its records begin and end, if that is known (see `index_records`).
    """

    def __init__(self, path: Path | str, records: tuple[np.ndarray, np.ndarray] | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"no data file {str(path)!r}; expected a LLaVA-format JSON file (--data FILE.json)"
            )
        self.starts, self.ends = records or index_records(self.path)
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Sample:
        start, end = int(self.starts[index]), int(self.ends[index])
        return parse_sample(os.pread(self._open(), end - start, start))

    def samples(self, skipped: Counter[str]) -> Iterator[Sample]:
        """All usable samples in file order; the others are counted in `skipped` by reason."""
        for index in range(len(self)):
            try:
                yield self[index]
            except SampleError as error:
                skipped[str(error)] += 1

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            # no __del__: at the interpreter's exit it runs when `os` may be gone, and complains
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}


def index_records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets (start, end) of the array's elements, int64 (n_records,) each.

    Raises UserError if the file is not one complete JSON array.
    """
    starts, ends = array("q"), array("q")
    with open(path, "rb") as file:
        if not _opens_an_array(file.read(4096)):
            raise UserError(f"{path} is not a JSON array; expected LLaVA's format: [{{...}}, ...]")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            depth = _find_records(data, starts, ends)
    if depth < 0:
        raise UserError(f"{path} goes on after its array of records; expected one [...] alone")
    if depth != 0:
        raise UserError(
            f"{path} ends inside a record (after {len(ends)} complete ones): the file is truncated "
            "or not JSON; fetch or write it again"
        )
    return np.frombuffer(starts, dtype=np.int64), np.frombuffer(ends, dtype=np.int64)


def _opens_an_array(head: bytes) -> bool:
    return head.removeprefix(_BOM).lstrip()[:1] == b"["


def _find_records(data: mmap.mmap, starts: array, ends: array) -> int:
    """Append the offsets of everything at depth 1 of the array.

    Returns the final depth; -1 where anything stands beside the array.
    """
    depth, opened = 0, False
    for match in _STRUCTURE.finditer(data, len(_BOM) if data[: len(_BOM)] == _BOM else 0):
        byte = data[match.start()]
        if opened and depth == 0:
            return -1
        if byte in b"{[":
            depth, opened = depth + 1, True
            if depth == 2:
                starts.append(match.start())
        elif byte in b"}]":
            depth -= 1
            if depth == 1:
                ends.append(match.end())
        elif depth == 1:  # a string, a number or a word directly inside the array
            starts.append(match.start())
            ends.append(match.end())
    return depth


def parse_sample(record: bytes) -> Sample:
    """One record of the array -> Sample; raises SampleError with the reason when unusable."""
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise SampleError("record is not valid JSON") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("conversations"), list):
        raise SampleError("no conversations")
    images = fields.get("image") or ()
    listed = isinstance(images, list)
    images = tuple(images) if listed else (images,) if images else ()
    turns = _alternating(fields["conversations"])
    _check_image_tags(turns, images)
    try:
        words = patch_words.parse(fields.get("patch_words"), len(images), listed)
    except ValueError as error:
        raise SampleError(str(error)) from error
    return Sample(str(fields.get("id", "")), images, turns, words)


def _alternating(conversations: list[Any]) -> list[dict[str, str]]:
    """The turns from the first human one to the last answer; SampleError if roles repeat."""
    try:
        turns = [{"from": turn["from"], "value": _text(turn["value"])} for turn in conversations]
    except (TypeError, KeyError) as error:
        raise SampleError("a turn without 'from' or 'value'") from error
    if turns and turns[0]["from"] != "human":
        turns = turns[1:]
    turns = turns[: len(turns) - len(turns) % 2]
    if not turns:
        raise SampleError("no conversations")
    if any(turn["from"] != ("human", "gpt")[i % 2] for i, turn in enumerate(turns)):
        raise SampleError("turns do not alternate between human and gpt")
    return turns


def _text(value: Any) -> str:
    """A turn's text, or number as text; SampleError for what a model must not learn to say."""
    if type(value) not in (str, int, float) or value != value:
        raise SampleError("a turn whose value is no text")
    text = str(value)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise SampleError("a turn with half a surrogate pair")
    return text


def _check_image_tags(turns: list[dict[str, str]], images: tuple[str, ...]) -> None:
    if any(not isinstance(image, str) for image in images):
        raise SampleError("image is not a path")
    if any(IMAGE in turn["value"] for turn in turns if turn["from"] == "gpt"):
        raise SampleError("<image> in an answer")
    tags = sum(turn["value"].count(IMAGE) for turn in turns)
    if tags != len(images):
        raise SampleError("number of <image> tags differs from number of images")


@dataclass(frozen=True)
class SampleIndex:
    """What one look at every record found.

    usable: int64 (n,) record numbers; lengths: int64 (n,) tokens of each;
    skipped: reason -> number of records; first: reason -> number of the first such record.
    """

    usable: np.ndarray
    lengths: np.ndarray
    skipped: Counter[str]
    first: dict[str, int]

    def describe(self) -> str:
        """One line: how many samples train and how many were left out, and why."""
        total = len(self.usable) + sum(self.skipped.values())
        reasons = ", ".join(
            f"{count} {reason}, first: record {self.first[reason]}"
            for reason, count in self.skipped.items()
        )
        return f"{len(self.usable)} of {total} samples usable" + (
            f" ({reasons})" if reasons else ""
        )


CountTokens = Callable[[list[list[dict[str, str]]]], list[int]]
AT_ONCE = 1000  # conversations that are tokenized together


def rough_counts(conversations: list[list[dict[str, str]]]) -> list[int]:
    """Four characters a token; batches grouped by it are a tenth of padding."""
    return [sum(len(turn["value"]) for turn in turns) // 4 for turns in conversations]


def index_samples(
    file: LlavaFile,
    images: Path | None,
    image_tokens: int,
    strict: bool = False,
    progress: bool = True,
    template: str = "vicuna_v1",
    count: CountTokens = rough_counts,
    drop_repetitive: bool = False,
) -> SampleIndex:
    """Parse every record once, see that its image files exist, count its tokens.

    image_tokens: how many an image becomes, at most; template: decides which records fit; count:
    of their text, which is asked for a thousand at a time; drop_repetitive: leave out samples with
    an answer that repeats itself (repetition.py).  Raises UserError at the first unusable
    record if `strict`, or if no record is usable.
    """
    usable, lengths = array("q"), array("q")
    waiting: list[Sample] = []

    def measure() -> None:
        for sample, tokens in zip(waiting, count([s.conversations for s in waiting]), strict=True):
            lengths.append(tokens + image_tokens * len(sample.images))
        waiting.clear()

    skipped: Counter[str] = Counter()
    first: dict[str, int] = {}
    for index in tqdm(range(len(file)), desc="reading samples", unit="", disable=not progress):
        try:
            sample = file[index]
            check_template(sample, template)
            check_images(sample, images)
            if drop_repetitive:
                _check_repetition(sample)
        except SampleError as error:
            reason = str(error)
            if strict:
                raise UserError(
                    f"{file.path}: record {index}: {reason}; fix it or run without --strict"
                ) from error
            skipped[reason] += 1
            first.setdefault(reason, index)
            continue
        usable.append(index)
        waiting.append(sample)
        if len(waiting) == AT_ONCE:
            measure()
    if waiting:
        measure()
    found = SampleIndex(
        np.frombuffer(usable, dtype=np.int64),
        np.frombuffer(lengths, dtype=np.int64),
        skipped,
        first,
    )
    if not len(usable):
        raise UserError(f"{file.path}: {found.describe()}; check --data and --images")
    return found


def _check_repetition(sample: Sample) -> None:
    """Raise SampleError where an answer repeats itself."""
    for turn in sample.conversations:
        if turn["from"] == "gpt" and (reason := repetition(turn["value"])):
            raise SampleError(reason)


def check_template(sample: Sample, template: str) -> None:
    """Raise SampleError where `plain` is asked for more than one question with images and answer.

    That template shows pictures and learns their caption, without the question; LLaVA's train.py
    asserts the same of a record.
    """
    if template != "plain":
        return
    if not sample.images:
        raise SampleError("no image, where captions are learnt")
    if len(sample.conversations) > 2:
        raise SampleError("more than one round, where captions are learnt")


def check_images(sample: Sample, folder: Path | None) -> None:
    """Raise SampleError unless every image file of the sample exists under `folder`."""
    for image in sample.images:
        if folder is None:
            raise SampleError("image, but no image folder given (--images)")
        path = os.path.join(folder, image)
        if not is_inside(path, folder):
            raise SampleError("image path leads out of the image folder")
        if not os.path.isfile(path):
            raise SampleError("missing image file")
