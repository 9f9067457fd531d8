"""The feed-forward layer of Llama: out_proj(silu(gate) * up), gate and up from in_proj (SwiGLU).

(Shazeer, 2002.05202.)  It looks at one token at a time, so there is nothing to remember.
Sizes: D d_model, F d_intermediate.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlmamba.configs.language import MambaConfig
from vlmamba.models.linear import Linear
from vlmamba.models.mixers.base import Layer


class GatedMLP(Layer):
    """(..., D) -> (..., D) without norm and residual; projections are named as a Mamba layer's."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.width = config.d_intermediate
        self.in_proj = Linear(config.d_model, 2 * self.width, bias=False)  # gate, up
        self.out_proj = Linear(self.width, config.d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, up = self.in_proj(u).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up)

    def inner_flops(self, tokens: int) -> float:
        """None besides the projections."""
        return 0.0

    def activation_bytes(self, element: int) -> tuple[int, int]:
        """gate, up, silu(gate) and the product."""
        return 4 * self.width * element, 2 * self.width * element
