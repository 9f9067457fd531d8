"""LoRA beside whole numbers: additions that learn, and stay apart, in layers that are packed.

    y = x (scale Q)^T + (alpha / rank) x A^T B^T        A (rank, I), B (O, rank), zero at first

QSLAW's last stage (2408.03735), as QLoRA before it (2305.14314): Q and its scales are frozen, A and
B learn.  The sum of both would have to be rounded again, so a saved model has A and B of their own
in model.safetensors, and `low_rank` in its config.json says which layers have them.

    add(model.language_model, LowRankSettings(rank=64, alpha=128.0, targets=("in_proj",)))
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.models.language.base import LanguageModel
from vlmamba.models.linear import Linear
from vlmamba.models.quantized import QuantizedLinear
from vlmamba_core.errors import UserError


@dataclass(frozen=True)
class LowRankSettings:
    """rank; alpha, which over the rank weighs the addition; targets: names of projections."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def read(cls, fields: dict[str, Any]) -> LowRankSettings:
        """Of a configuration's `low_rank`, checked there."""
        return cls(fields["rank"], float(fields["alpha"]), tuple(fields["targets"]))

    def fields(self) -> dict[str, Any]:
        """What `read` takes, as JSON has it."""
        return asdict(self) | {"targets": list(self.targets)}


class LowRank(nn.Module):
    """The addition to one layer; dropout: of what goes into A, in training."""

    def __init__(self, layer: QuantizedLinear, rank: int, alpha: float):
        super().__init__()
        device = layer.weight.device
        self.down = Linear(layer.in_features, rank, bias=False, device=device)
        self.up = Linear(rank, layer.out_features, bias=False, device=device)
        self.weight_of_all, self.dropout = alpha / rank, 0.0
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        x = F.dropout(x, self.dropout, self.training)
        return self.weight_of_all * self.up(self.down(x))


def add(model: LanguageModel, settings: LowRankSettings) -> list[LowRank]:
    """Give the packed projections called `targets` of all blocks an addition, in place.

    Returns the new ones.  Raises UserError where a target is no packed projection.
    """
    made: dict[str, list[LowRank]] = {name: [] for name in settings.targets}
    for part in (part for block in model.blocks() for part in block.modules()):
        for name, child in part.named_children():
            if name in made and isinstance(child, QuantizedLinear):
                child.low_rank = LowRank(child, settings.rank, settings.alpha)
                made[name].append(child.low_rank)
    for name, found in made.items():
        if not found:
            raise UserError(f"low_rank: the model has no packed projection {name!r}")
    return [one for found in made.values() for one in found]


def additions(model: nn.Module) -> list[LowRank]:
    """All that the model has."""
    return [module for module in model.modules() if isinstance(module, LowRank)]


def packed_layers(model: nn.Module) -> list[QuantizedLinear]:
    """The layers of whole numbers, with additions or without."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]
