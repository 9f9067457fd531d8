"""The process in which one point is measured, so that nothing outlives its death.

    python -m harness.speed.sweep.worker POINT_AS_JSON     # or: machine TERMS_AS_JSON

Prints one line of JSON: {"status", "detail", "result"}.  `harness.speed.sweep.lengths` starts it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

from harness.runs.points import FAILED, OK, OUT_OF_MEMORY
from harness.speed.sweep.points import Point, Terms
from vlmamba_core.errors import first_line

EXHAUSTED = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
)


@contextlib.contextmanager
def memory_limit(limit_bytes: int | None) -> Iterator[None]:
    """Refuse this process more data than `limit_bytes`, so that it fails before the machine does.

    Of a GPU's memory the allocator keeps count itself.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def outcome(point: Point) -> dict[str, Any]:
    """What the process prints: the result, or why there is none."""
    try:
        import transformers

        from harness.speed.sweep.measure import measure  # all code before memory is limited

        transformers.utils.logging.set_verbosity_error()
        limit = None if point.terms.device.startswith("cuda") else point.terms.memory_limit_bytes
        with memory_limit(limit):
            return {"status": OK, "detail": None, "result": measure(point)}
    except Exception as error:  # a lack of memory comes as many classes, also wrapped in others
        text = first_line(error, 300)
        exhausted = isinstance(error, MemoryError) or any(x in text.lower() for x in EXHAUSTED)
        if exhausted:
            return {"status": OUT_OF_MEMORY, "detail": text, "result": None}
        return {"status": FAILED, "detail": f"{type(error).__name__}: {text}", "result": None}


def main(argv: list[str]) -> None:
    """Measure what the arguments say; see the module's text."""
    if argv[0] == "machine":
        from harness.speed.sweep.measure import measure_machine

        print(json.dumps(measure_machine(Terms(**json.loads(argv[1])))))
    else:
        print(json.dumps(outcome(Point.from_json(argv[0])), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
