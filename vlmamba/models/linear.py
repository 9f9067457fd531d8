"""A linear layer whose inference on a CPU is as fast as the machine allows.

    y = x W^T + b

Decoding multiplies one row, or a few, with every weight of the model, so reading the weights once
is all the time it needs to take.  The matrix-vector product that PyTorch calls on a CPU runs on one
thread; the kernel in `csrc/linear.cpp` shares the rows of W out among all threads, and multiplies
bfloat16 by the processor's own dot product where it has one.  Sequences go to the faster library
(`products`).

Which of the two it is depends on the shape alone, (B, D) or (B, L, D), not on how many rows there
are: so what a row becomes is the same, bit for bit, whatever the batch.  A sequence of one token,
(B, 1, D), is a sequence: beside longer ones it would be one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from vlmamba.models.products import DTYPES, product
from vlmamba.models.scan_backends.build import kernels

MOST_ROWS = 256  # above, reading the weights is nothing beside multiplying them
_decoding: ContextVar[bool] = ContextVar("decoding", default=False)


class Linear(nn.Linear):
    """nn.Linear, parameters and results alike (to rounding); inference on a CPU is faster."""

    @property
    def numbers(self) -> tuple[Tensor, None, int]:
        """What the kernels read: the weight, no scales, columns that share one."""
        weight = self._parameters.get("weight")  # faster than by nn.Module: once a token and layer
        return self.weight if weight is None else weight, None, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return rows_product(x, self.weight, self.bias)


def rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear as `Linear` computes it: (..., in), (out, in), (out,) -> (..., out)."""
    if is_step(x, weight.dtype) and (module := kernels()) is not None:
        return module.linear(x.contiguous(), weight, bias)
    return product(x, weight, bias)


def is_step(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x holds single tokens, for which the kernels of csrc are made: (D,) or (B, D)."""
    return (
        x.ndim <= 2
        and x.device.type == "cpu"
        and x.dtype == dtype
        and dtype in DTYPES
        and not torch.is_grad_enabled()
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
    )


@contextmanager
def decoding() -> Iterator[None]:
    """A step of a model whose layers take sequences alone: `tokens` finds its single tokens."""
    before = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(before)


def tokens(x: Tensor) -> Tensor:
    """(B, 1, D) -> (B, D) while `decoding` on a CPU; everything else as it is."""
    alone = x.ndim == 3 and x.shape[1] == 1 and x.device.type == "cpu" and _decoding.get()
    return x[:, 0] if alone else x


def use_fast_products(part: nn.Module) -> None:
    """Make every nn.Linear inside, other people's models included, multiply as `Linear` does."""
    for module in part.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
