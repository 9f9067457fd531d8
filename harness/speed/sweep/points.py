"""Points of a profile: what is measured, under which settings, and the journal of finished ones.

    points = plan(["vl-mamba-130m", "pythia-160m"], [256, 512], [1], settings)

A point is one model at one batch size and sequence length.  Its key covers everything the
measurement depends on, so that a journal finds it again.  No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from harness.runs.points import Row
from harness.runs.schema import code_sha256, packages
from vlmamba_core import folder
from vlmamba_core.folder import digest


@dataclass(frozen=True)
class Settings:
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
    """One model, batch size and sequence length (all tokens, the image's among them).

    quantize: the kind of its language model's weights where they are whole numbers; numbers: what
    is said of its weights where a sweep has a model in several ways.
    """

    model: str
    seq_len: int
    batch_size: int
    settings: Settings
    quantize: str | None = None
    numbers: str = ""

    @property
    def key(self) -> str:
        """A digest of everything the measurement depends on."""
        return digest([asdict(self), code_sha256(), packages(), psutil.cpu_count()])

    @property
    def image_tokens(self) -> int:
        """Tokens of the image; none where the sequence is too short to hold it and a question."""
        return self.settings.image_tokens if self.settings.image_tokens < self.seq_len else 0

    @property
    def name(self) -> str:
        """For the progress bar and messages."""
        return f"{self.label} {self.batch_size}x{self.seq_len}"

    @property
    def label(self) -> str:
        """The model as rows, tables and plots name it."""
        return f"{self.model} {self.numbers}".rstrip()

    @classmethod
    def from_json(cls, text: str) -> Point:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"settings": Settings(**fields["settings"])})

    def to_json(self) -> str:
        """One line, for the child's command line."""
        return json.dumps(asdict(self))


def row_of(point: Point, status: str, detail: str | None = None, result: Any = None) -> Row:
    """A point and what came of it, as the record holds it."""
    where = (point.label, point.seq_len, point.batch_size, point.image_tokens)
    return Row(*where, status, detail, result)


@dataclass(frozen=True)
class Weights:
    """The numbers that the models of a sweep are measured in.

    dtypes: of all models; kinds: whole numbers besides, of the models in `quantizable`, which then
    multiply numbers of the first dtype.
    """

    dtypes: Sequence[str]
    kinds: Sequence[str] = ()
    quantizable: Container[str] = ()

    def of(self, model: str) -> list[tuple[str, str | None, str]]:
        """(dtype, kind or None, what rows call it) of every way that the model is measured in."""
        plain = [(dtype, None, dtype if len(self.dtypes) > 1 else "") for dtype in self.dtypes]
        kinds = self.kinds if model in self.quantizable else ()
        return [*plain, *((self.dtypes[0], kind, kind) for kind in kinds)]


def plan(
    models: Sequence[str],
    seq_lens: Sequence[int],
    batch_sizes: Sequence[int],
    settings: Settings,
    weights: Weights | None = None,
) -> list[Point]:
    """Every point, short sequences first, models in turn: an early stop leaves whole lengths."""
    weights = weights or Weights([settings.dtype])
    return [
        Point(model, seq_len, batch_size, replace(settings, dtype=dtype), kind, numbers)
        for batch_size in sorted(set(batch_sizes))
        for seq_len in sorted(set(seq_lens))
        for model in dict.fromkeys(models)
        for dtype, kind, numbers in weights.of(model)
    ]


class Journal:
    """Finished points on disk by their key; what cannot be used is measured anew."""

    def __init__(self, path: Path) -> None:
        self._kept = folder.Journal[dict[str, Any]](path)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, point: Point) -> Row | None:
        """What came of the point, if it is finished."""
        found = self._kept.get(point.key)
        return None if found is None else Row(**found)

    def add(self, point: Point, row: Row) -> None:
        """Append a row; it is on disk on return. Raises UserError when the disk refuses."""
        self._kept.add(point.key, asdict(row))
