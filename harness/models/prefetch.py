"""The next pictures while the model computes: one thread, one batch ahead.

    for batch, found in in_turn(work, batches, ahead=True):
        ...                      # work(the next batch) goes on meanwhile

For a model on an accelerator, whose processor waits anyway; on a CPU the model has all cores, and a
thread beside it would take them away.  What `work` does may touch nothing that the caller touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_turn(work: Callable[[T], R], items: Iterable[T], ahead: bool) -> Iterator[tuple[T, R]]:
    """Each item with what `work` makes of it, in order; `ahead`: the next one's in a thread.

    What `work` raises is raised when its item's turn comes.
    """
    if not ahead:
        for item in items:
            yield item, work(item)
        return
    with ThreadPoolExecutor(1, "prefetch") as pool:
        before: tuple[T, Future[R]] | None = None
        try:
            for item in items:
                following = (item, pool.submit(work, item))
                if before is not None:
                    yield before[0], before[1].result()
                before = following
            if before is not None:
                yield before[0], before[1].result()
        finally:  # whoever stops early waits for no batch that has not begun
            pool.shutdown(wait=True, cancel_futures=True)
