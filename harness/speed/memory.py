"""Peak memory of a piece of work: on a GPU of PyTorch's allocator, else of this process.

memory = Memory("cpu")
loaded = memory.reset()           # bytes held now; a new peak begins
...
memory.peak()                     # the most bytes held at once since then
"""

from __future__ import annotations

import gc

import torch

from vlmamba_core import memory


class Memory:
    """Counts bytes: tensors of the current GPU, or what of this process is resident."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")

    def reset(self) -> int:
        """Begin a new peak; bytes held now."""
        if not self._on_gpu:
            return memory.reset_peak()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most bytes held at once since `reset`."""
        if not self._on_gpu:
            return memory.peak_resident_bytes()
        return torch.cuda.max_memory_allocated()
