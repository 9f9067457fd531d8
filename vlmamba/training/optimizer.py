"""AdamW over the parameters that learn: groups by learning rate and by weight decay."""

from __future__ import annotations

import torch
from torch import nn

from vlmamba.training.recipe import Hyperparameters


def build_optimizer(model: nn.Module, hyper: Hyperparameters) -> torch.optim.AdamW:
    """Each group's `peak_lr` is what the schedule's factor multiplies.

    The connector may have a rate of its own (hyper.connector_lr).  Decay is for matrices; vectors,
    biases and the scan's A_log and D never decay.  LLaVA-1.5's recipe has no weight decay at all.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("A_log")
            decay = hyper.weight_decay if is_matrix else 0.0
            peak_lr = hyper.lr
            if hyper.connector_lr is not None and "connector." in name:
                peak_lr = hyper.connector_lr
            groups.setdefault((peak_lr, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": peak_lr, "peak_lr": peak_lr, "weight_decay": decay}
            for (peak_lr, decay), parameters in groups.items()
        ],
        betas=(hyper.beta1, hyper.beta2),
        fused=True,
    )
