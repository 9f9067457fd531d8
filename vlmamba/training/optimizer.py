"""AdamW over the parameters that learn, in groups with and without weight decay."""

from __future__ import annotations

import torch
from torch import nn

from vlmamba.training.recipe import Hyperparameters


def build_optimizer(model: nn.Module, hyper: Hyperparameters) -> torch.optim.AdamW:
    """Decay is for matrices; vectors, biases and the scan's A_log and D never decay.

    LLaVA-1.5's recipe has no weight decay at all, so the two groups differ only where a recipe
    asks for some.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("A_log")
            (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": hyper.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=hyper.lr,
        betas=(hyper.beta1, hyper.beta2),
        fused=True,
    )
