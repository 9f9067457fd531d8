"""Runs of several processes (`accelerate launch`): what one does when another dies.

    with ranks.together():
        ...                     # collectives, generation

A launcher that sees one process die ends the others with SIGTERM, and a collective that waits for
it fails.  Either way the survivors keep their answers and say, in one line, how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from vlmamba_core.errors import UserError

LOST = (
    "another process of this run died; answers so far are kept, run the same command again to "
    "continue"
)
PEER_ERRORS = ("gloo", "connection closed by peer", "nccl", "connection reset", "broken pipe")


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turn the death of another process of this run into a UserError."""
    if not several():
        yield
        return
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in PEER_ERRORS):
            raise
        raise UserError(LOST) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(*_: Any) -> None:
    raise UserError(LOST)


def gather(value: Any) -> list[Any]:
    """Every process's `value`, by rank; all call it."""
    if not several():
        return [value]
    import torch.distributed

    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
