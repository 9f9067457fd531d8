"""The process in which one point is measured, so that nothing outlives its death.

    python -m harness.speed.sweep.worker POINT_AS_JSON     # or: machine SETTINGS_AS_JSON

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
from harness.speed.sweep.points import Point, Settings
from vlmamba_core.errors import first_line

EXHAUSTED = (  # as told by allocators, the loader of shared libraries and makers of threads
    "can't allocate",
    "cannot allocate",
    "cannot map",
    "failed to map segment",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "thread creation failed",
    "resource temporarily unavailable",
    "could not create a primitive",  # oneDNN, whose scratch memory was refused, says no more
    "could not create a memory object",
)


def exhausted(text: str) -> bool:
    """Whether an error's text says that memory ran out."""
    return any(phrase in text.lower() for phrase in EXHAUSTED)


def caused_by_lack_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in the error or in one that it was raised for."""
    if isinstance(error, MemoryError) or exhausted(str(error)):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and caused_by_lack_of_memory(cause)


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
        limit = (
            None if point.settings.device.startswith("cuda") else point.settings.memory_limit_bytes
        )
        with memory_limit(limit):
            return {"status": OK, "detail": None, "result": measure(point)}
    except Exception as error:  # a lack of memory comes as many classes, also wrapped in others
        text = first_line(error, 300)
        if caused_by_lack_of_memory(error):
            return {"status": OUT_OF_MEMORY, "detail": text, "result": None}
        return {"status": FAILED, "detail": f"{type(error).__name__}: {text}", "result": None}


def main(argv: list[str]) -> None:
    """Measure what the arguments say; see the module's text."""
    if argv[0] == "machine":
        from harness.speed.sweep.measure import measure_machine

        print(json.dumps(measure_machine(Settings(**json.loads(argv[1])))))
    else:
        print(json.dumps(outcome(Point.from_json(argv[0])), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
