"""Memory of a pass that trains a language model, found by running it on tensors without data.

PyTorch's FakeTensorMode runs every operation of the forward and the backward pass for its shapes
alone; `Live` adds up the storages that exist at a time.  So attention that keeps its L x L scores,
a scan cut into chunks, weights that autocast copies, layers that are run again and LoRA are
counted as they are, whatever the family.  The operations are those that a CPU would run: the
reference code of a hybrid's scan takes more than its fused CUDA kernels do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from vlmamba.models.language.base import LanguageModel


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes beside parameters and their gradients: at the end of the forward pass, at the start of
    the backward pass, when autocast has let its copies of weights go, and at the latter's peak."""

    forward: int
    kept: int
    backward: int


FEW = 16  # tokens of a row where the model loops over them


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that still exist: `now`, and the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.operations = 0
        self._seen = weakref.WeakSet[Any]()

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count what `tensor` lies in."""
        self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """The operation, whose results are counted."""
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)


class _Pass(nn.Module):
    """A pass through a language model as one module: all of it sees the same weights."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, shape: tuple[int, int, int], dtype: torch.dtype) -> ActivationBytes:
        with Live() as live:
            for tensor in (*self.parameters(), *self.buffers()):
                live.leave_out(tensor)
            embeds = torch.empty(shape, requires_grad=True)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                hidden = self.model(embeds)[0]  # the cache is let go
                forward = live.now
            kept = live.most = live.now
            hidden.backward(torch.empty_like(hidden))
        return ActivationBytes(forward, kept, live.most)


class _Operations(_Pass):
    """How many operations a forward pass has."""

    def forward(self, shape: tuple[int, int, int]) -> int:  # type: ignore[override]
        with Live() as live, torch.no_grad():
            self.model(torch.empty(shape))
        return live.operations


def count_activations(
    model: LanguageModel, rows: int, tokens: int, dtype: torch.dtype
) -> ActivationBytes:
    """What a pass over (rows, tokens, D) embeddings takes, in `dtype` by autocast.

    model: as it will be trained (what is frozen, LoRA, checkpointing), on any
    device, meta included.  Its forward pass may not look into the values of tensors.  Where it
    loops over tokens, each of which takes as much, as many stand in more and shorter rows.
    """
    with FakeTensorMode():
        fake = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            fake[f"model.{name}"] = stand_in = torch.empty(tensor.shape, dtype=tensor.dtype)
            if tensor.requires_grad:
                stand_in.requires_grad_()
                stand_in.register_post_accumulate_grad_hook(_without_gradient)

        def run(form: type[_Pass], rows: int, tokens: int, *more: Any) -> Any:
            shape = (rows, tokens, model.config.hidden_size)
            return torch.func.functional_call(form(model), fake, (shape, *more))

        if tokens > FEW and run(_Operations, 1, 2) < run(_Operations, 1, 4):
            rows, tokens = -(-rows * tokens // FEW), FEW
        return run(_Pass, rows, tokens, dtype)


def _without_gradient(parameter: Tensor) -> None:
    parameter.grad = None
