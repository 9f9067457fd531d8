"""LoRA's additions to a model's weights: W + scale B A, in float32.

    merge(model, folder)      # of a training checkpoint, whose weights lie there without it

A checkpoint that a LoRA run writes on its way holds the untouched weights, for an exact resume, and
`adapter/` beside them, as peft writes it; whoever loads it wants the two together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmamba.weight_files import read_object, tensors
from vlmamba_core.errors import UserError

PREFIX = "base_model.model."  # of names in peft's files
FILE = "adapter_model.safetensors"
DOWN = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_A\.weight")


def pending(folder: Path) -> Path | None:
    """The adapter that a folder's weights lack: beside a training checkpoint's, not in `final/`."""
    adapter = Path(folder) / "adapter"
    return adapter if adapter.is_dir() and (Path(folder) / "state.json").is_file() else None


def additions(adapter: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """(name of a weight, its addition in float32), of peft's tensors A (r, in) and B (out, r)."""
    for key, down in adapter.items():
        if match := DOWN.fullmatch(key):
            up = adapter[key.replace("lora_A", "lora_B")]
            yield f"{match[1]}.weight", scale * (up.float() @ down.float())


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> None:
    """Add the adapter in `folder` to the weights. Raises UserError where it does not fit."""
    fields = read_object(folder / "adapter_config.json")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{folder}: adapter_config.json has r={rank!r}, lora_alpha={alpha!r}")
    held = dict(tensors([folder / FILE]))
    weights = dict(model.named_parameters())
    found = 0
    try:
        for name, addition in additions(held, alpha / rank):
            weight = weights[name]
            weight.data = (weight.float() + addition).to(weight.dtype)
            found += 2
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: the adapter does not fit its model: {error}") from error
    if found != len(held):
        raise UserError(f"{folder}: {FILE} holds {len(held)} tensors, {found} of LoRA's known form")
