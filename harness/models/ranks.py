"""Runs of several processes (`accelerate launch`): what one does when another dies.

    with ranks.together():
        ranks.join()
        mine = ranks.share([request.image_key for request in requests])
        ...                     # generation
        everything = ranks.gather(answers)

A launcher that sees one process die ends the others with SIGTERM, and a collective that waits for
it fails.  Either way the survivors keep their answers and say, in one line, how to go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from datetime import timedelta
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


def world_size() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Whether this process is one of several."""
    return world_size() > 1


def join() -> None:
    """Meet the other processes, where there are some; what they exchange stays in host memory."""
    if not several():
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        # those that are done wait for the others; one that died closes its connections at once
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))


def device(name: str) -> str:
    """The device called `name`; this process's own GPU where several processes share "cuda"."""
    if not several() or name not in ("auto", "cuda"):
        return name
    import torch

    if not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def share(keys: Sequence[str | None]) -> list[int]:
    """The places in `keys` that are this process's; equal keys (one image) stay together."""
    if not several():
        return list(range(len(keys)))
    owners: dict[str, int] = {}
    names = [f"place {place}" if key is None else f"key {key}" for place, key in enumerate(keys)]
    for name in names:
        owners.setdefault(name, len(owners) % world_size())
    return [place for place, name in enumerate(names) if owners[name] == rank()]


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
