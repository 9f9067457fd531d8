"""A linear layer that is as fast as memory allows for the few rows of a decoding step.

    y = x W^T + b

Decoding multiplies one row, or a few, with every weight of the model, so reading the weights once
is all the time it needs to take.  The matrix-vector product that PyTorch calls on a CPU runs on one
thread; the kernel in `csrc/linear.cpp` shares the rows of W out among all threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.models.scan_backends.build import kernels

FEW_ROWS = 16  # above, a matrix product that keeps parts of W in cache is faster


class Linear(nn.Linear):
    """nn.Linear, parameters and results alike (to rounding); inference on a CPU is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if (
            x.device.type == "cpu"
            and x.numel() <= FEW_ROWS * self.in_features
            and not torch.is_grad_enabled()
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.bfloat16)
            and not torch.is_autocast_enabled("cpu")
            and (module := kernels()) is not None
        ):
            return module.linear(x.contiguous(), self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
