"""Points of a profile: what is measured, under which terms, and what came out.

    points = plan(["vl-mamba-130m", "pythia-160m"], [256, 512], [1], terms)

A point is one model at one batch size and sequence length.  Its key covers everything the
measurement depends on, so that a journal finds it again.  No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.runs.schema import code_sha256, packages
from vlmamba_core.errors import UserError
from vlmamba_core.folder import digest

# How a point may end. Everything but OK has a `detail` that says more.
OK = "ok"
OUT_OF_MEMORY = "out of memory"
TIME_LIMIT = "time limit"
KILLED = "killed"
FAILED = "failed"
NOT_RUN = "not run"  # a shorter sequence of the same model already was too much


@dataclass(frozen=True)
class Terms:
    """What all points of a sweep share.

    decode: tokens generated after the prompt; image_tokens: how many of a sequence are an image's;
    seconds: repeats go on for about so long; time_limit_s, memory_limit_bytes: what a point's
    process may take; tiny: shrunk models, for tests.
    """

    image_tokens: int
    decode: int
    dtype: str
    device: str
    compile: bool
    threads: int
    seconds: float
    time_limit_s: float
    memory_limit_bytes: int | None
    tiny: bool = False


@dataclass(frozen=True)
class Point:
    """One model, batch size and sequence length (all tokens, the image's among them)."""

    model: str
    seq_len: int
    batch_size: int
    terms: Terms

    @property
    def key(self) -> str:
        """A digest of everything the measurement depends on."""
        return digest([asdict(self), code_sha256(), packages(), os.cpu_count()])

    @property
    def image_tokens(self) -> int:
        """Tokens of the image; none where the sequence is too short to hold it and a question."""
        return self.terms.image_tokens if self.terms.image_tokens < self.seq_len else 0

    @property
    def name(self) -> str:
        """For the progress bar and messages."""
        return f"{self.model} {self.batch_size}x{self.seq_len}"

    @classmethod
    def from_json(cls, text: str) -> Point:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"terms": Terms(**fields["terms"])})

    def to_json(self) -> str:
        """One line, for the child's command line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Row:
    """A point and what came of it; `result` as `child.measure` gives it, None unless ok."""

    model: str
    seq_len: int
    batch_size: int
    image_tokens: int
    status: str
    detail: str | None = None
    result: dict[str, Any] | None = None

    @classmethod
    def of(cls, point: Point, status: str, detail: str | None = None, result: Any = None) -> Row:
        """The row of a point."""
        where = (point.model, point.seq_len, point.batch_size, point.image_tokens)
        return cls(*where, status, detail, result)


def plan(
    models: Sequence[str], seq_lens: Sequence[int], batch_sizes: Sequence[int], terms: Terms
) -> list[Point]:
    """Every point, short sequences first, models in turn: an early stop leaves whole lengths."""
    return [
        Point(model, seq_len, batch_size, terms)
        for batch_size in sorted(set(batch_sizes))
        for seq_len in sorted(set(seq_lens))
        for model in dict.fromkeys(models)
    ]


class Journal:
    """Finished points on disk, one JSON line each; a torn or altered line is measured anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}
        lines = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                key, checksum = entry.pop("key"), entry.pop("sum")
                if checksum == digest([key, entry]):
                    self._rows[key] = Row(**entry)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue

    def get(self, point: Point) -> Row | None:
        """What came of the point, if it is finished."""
        return self._rows.get(point.key)

    def add(self, point: Point, row: Row) -> None:
        """Append a row; it is on disk on return. Raises UserError when the disk refuses."""
        self._rows[point.key] = row
        entry = {"key": point.key, **asdict(row), "sum": digest([point.key, asdict(row)])}
        line = json.dumps(entry, allow_nan=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n" if _ends_whole(self._path) else f"\n{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; points so far are kept, "
                "run the same command again to continue"
            ) from error


def _ends_whole(path: Path) -> bool:
    """Whether the file ends with a line break (or is empty)."""
    return not (path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"))


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows with a result."""
    return [row for row in rows if row.status == OK]
