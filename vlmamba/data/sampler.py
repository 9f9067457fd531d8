"""Which samples form which batch: length-grouped, shuffled, a pure function of (seed, epoch).

Batches of one length waste no padding; because the order depends on nothing but its arguments,
a run can resume at any step, and any number of processes sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MEGABATCH = 50  # global batches that are sorted together: more groups better, fewer mix better


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """All positions 0..len(lengths)-1 once, in global batches of `batch_size` (the last smaller).

    Positions are shuffled, sorted by length inside windows of MEGABATCH batches, cut into
    batches, and the batches are shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    window = MEGABATCH * batch_size
    batches = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        chunk = chunk[np.argsort(-lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(
    batch: np.ndarray, processes: int, rank: int, micro_batch: int, batch_size: int
) -> list[np.ndarray]:
    """This process's part of a global batch, in micro-batches of at most `micro_batch`.

    Every process gets the same number of them (collectives must match), so the last ones of a
    small batch may be empty.
    """
    rounds = -(-batch_size // (processes * micro_batch))
    return np.array_split(batch, rounds * processes)[rank * rounds : (rank + 1) * rounds]


class MicroBatchOrder:
    """Sampler: the micro-batches of one process from step `start` up to step `stop`.

    A step is one global batch (one optimizer update); `rounds` micro-batches follow each other
    per step.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        micro_batch: int,
        seed: int,
        steps: tuple[int, int],
        processes: int = 1,
        rank: int = 0,
    ):
        self.lengths, self.seed, self.steps = lengths, seed, steps
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.processes, self.rank = processes, rank
        self.rounds = -(-batch_size // (processes * micro_batch))
        self.steps_per_epoch = -(-len(lengths) // batch_size)

    def __len__(self) -> int:
        return (self.steps[1] - self.steps[0]) * self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        start, stop = self.steps
        epoch, batches = -1, []
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                batches = epoch_batches(self.lengths, self.batch_size, self.seed, epoch)
            batch = batches[step % self.steps_per_epoch]
            for part in micro_batches(
                batch, self.processes, self.rank, self.micro_batch, self.batch_size
            ):
                yield part.tolist()
