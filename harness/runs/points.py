"""The points of a profile as record.json holds them: one model at one batch size and length.

No torch here: whoever reads a record needs no more than this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VL_MAMBA = "vl-mamba-"  # names of VL-Mamba's models begin with it; all others are baselines

# How a point may end. Everything but OK has a `detail` that says more.
OK = "ok"
OUT_OF_MEMORY = "out of memory"
TIME_LIMIT = "time limit"
KILLED = "killed"
FAILED = "failed"
NOT_RUN = "not run"  # a shorter sequence of the same model already was too much


@dataclass(frozen=True)
class Row:
    """A point and what came of it; `result` as harness.speed.sweep.measure gives it, if OK."""

    model: str
    seq_len: int
    batch_size: int
    image_tokens: int
    status: str
    detail: str | None = None
    result: dict[str, Any] | None = None
