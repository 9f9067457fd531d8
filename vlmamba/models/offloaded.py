"""Weights that accelerate keeps elsewhere: on the CPU or the disk, until their module is called.

    model = VLMambaForConditionalGeneration.from_pretrained(FOLDER, device_map="auto",
                                                            offload_folder="offload")

accelerate brings a module's weights when the module is called.  A fused kernel reads those of
several modules at once and calls none of them, so their hooks are run around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def offloads(module: nn.Module) -> bool:
    """Whether accelerate looks after where this module's weights are."""
    return "_hf_hook" in module.__dict__  # by nn.Module's own look-up this takes ten times longer


@contextmanager
def at_hand(*modules: nn.Module) -> Iterator[None]:
    """Have the modules' own weights where they are computed with, though nobody calls the modules.

    Submodules' are left where they are.
    """
    hooked: list[Any] = [module for module in modules if offloads(module)]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in reversed(hooked):
            module._hf_hook.post_forward(module, ())


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are computed with."""
    device = next(module.parameters()).device
    if device.type == "meta" and offloads(module):
        hook: Any = module._hf_hook
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
    return device
