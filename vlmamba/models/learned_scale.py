"""Rounding with a learned gain per group of weights: QSLAW's scale (2408.03735), before packing.

    Q  = clamp(round(W / d / s), -7, 7)      s: the usual scale of a group; d: learned, 1 at first
    W^ = Q s                                 not Q s d: d is a gain that stays in the weights

as in its released code (xjjxmu/QSLAW, quantizer.py); gradients pass the rounding as if it were not
there.  Other than released: whole numbers lie around zero instead of having an offset, s is that of
the largest weight instead of OmniQuant's, and every layer learns, not those from the sixth on.

Sizes: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.models.language.base import LanguageModel
from vlmamba.models.quantized import KINDS, Kind, QuantizedLinear, usual_scale


class ScaledLinear(nn.Module):
    """A frozen linear layer that computes as its rounded self does; its gain (O, G) learns."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: Kind):
        super().__init__()
        self.kind, self.bias = kind, linear.bias
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("scale", usual_scale(self.weight.float(), kind))
        self.gain = nn.Parameter(torch.ones_like(self.scale))
        self.group = min(kind.group or linear.in_features, linear.in_features)

    def _wide(self, groups: Tensor) -> Tensor:
        """(O, G) -> (O, I)."""
        return groups.repeat_interleave(self.group, dim=1)[:, : self.weight.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        scale, largest = self._wide(self.scale), self.kind.largest
        exact = self.weight.float() / self._wide(self.gain) / scale
        nearest = exact.detach().round()
        numbers = nearest.clamp(-largest, largest)
        inside = numbers == nearest
        # the whole numbers, with the gradient of what was rounded: straight through
        weight = (numbers + inside * (exact - exact.detach())) * scale
        return F.linear(x, weight.to(x.dtype), self.bias)

    @torch.no_grad()
    def packed(self) -> QuantizedLinear:
        """The layer of whole numbers that computes the same."""
        weight = self.weight.float() / self._wide(self.gain)
        linear = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), self.bias
        return QuantizedLinear.of(linear, self.kind, scale=self.scale)


def attach(model: LanguageModel, kind: str) -> list[nn.Parameter]:
    """Make every projection of the blocks a ScaledLinear, in place.

    Returns the gains, which alone learn.
    """
    model.requires_grad_(False)
    gains = []
    for part in [part for block in model.blocks() for part in block.modules()]:
        for name, child in list(part.named_children()):
            if name in model.lora_targets and isinstance(child, nn.Linear):
                scaled = ScaledLinear(child, KINDS[kind])
                setattr(part, name, scaled)
                gains.append(scaled.gain)
    return gains


def pack(model: LanguageModel) -> None:
    """Make every ScaledLinear the QuantizedLinear that computes the same, in place."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, ScaledLinear):
                setattr(part, name, child.packed())
