"""A Mamba-2 layer that reads its sequence both ways (ML-Mamba, 2407.19832, as released).

z, xBC, dt = in_proj(u)                                   shared
f = RMSNorm(ssd(conv(xBC), dt) silu(z))                   forward
b = the same with its own conv, A, D and dt_bias, on the flipped rows, flipped back
out = out_proj((f + b) / 2)                               norm and projection shared
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vlmamba.configs.language import MambaConfig
from vlmamba.models.mixers.mamba2 import Mamba2Mixer, ssd
from vlmamba.models.offloaded import at_hand
from vlmamba.models.selective_scan import causal_conv1d


class BidirectionalMamba2(Mamba2Mixer):
    """(B, L, D) -> (B, L, D), over whole sequences; there is no state to continue from."""

    bare = ("conv1d", "conv1d_b", "norm")

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.conv1d_b = nn.Conv1d(
            self.conv_width, self.conv_width, config.d_conv, groups=self.conv_width
        )
        self.dt_bias_b = nn.Parameter(torch.empty(self.n_heads))
        self.A_log_b = nn.Parameter(torch.empty(self.n_heads))
        self.D_b = nn.Parameter(torch.empty(self.n_heads))

    def initialize(self, n_layer: int) -> None:
        """Both ways start with the same decays, steps and skips."""
        super().initialize(n_layer)
        for name in ("dt_bias", "A_log", "D"):
            init.copy_(getattr(self, f"{name}_b"), getattr(self, name))

    def both_ways(self, u: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        projected = self.in_proj(u)
        with at_hand(self, *self.read_bare()):  # nobody calls the module itself
            ahead = self._one_way(projected, self.conv1d, self.A_log, self.D, self.dt_bias)
            back = self._one_way(
                projected.flip(1), self.conv1d_b, self.A_log_b, self.D_b, self.dt_bias_b
            )
        return self.out_proj((ahead + back.flip(1)) / 2)

    def _one_way(
        self,
        projected: Tensor,
        conv: nn.Conv1d,
        a_log: Tensor,
        skip: Tensor,
        dt_bias: Tensor,
    ) -> Tensor:
        """The projected rows -> (B, L, Di), gated and normed."""
        z, xbc, dt = self._split(projected)
        xbc, _ = causal_conv1d(xbc, conv.weight.squeeze(1), conv.bias, backend=self.backend)
        x, b, c = self._heads(xbc)
        decay = -torch.exp(a_log.float())
        y, _ = ssd(x, dt, decay, b, c, skip, dt_bias, backend=self.backend)
        return self._gated_norm(y.flatten(-2), z)
