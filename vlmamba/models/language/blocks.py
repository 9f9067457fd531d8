"""The blocks that a Mamba language model is a row of: pre-norm residual ones, by kind of layer.

    x + layer(norm(x))

Around one of the layers of vlmamba.models.mixers each; what a block takes and gives beside the
residual stream (states, keys and values) is its layer's.
Sizes: B batch, L sequence, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmamba.configs.language import MambaConfig
from vlmamba.models.mixers import MIXERS
from vlmamba.models.mixers.attention import CausalAttention
from vlmamba.models.mixers.base import Layer, Mixer
from vlmamba.models.mixers.experts import Experts
from vlmamba.models.mixers.fused import fused_norm, fused_step, residual_sum
from vlmamba.models.mixers.mlp import GatedMLP
from vlmamba.models.offloaded import at_hand, offloads


def build_norm(config: MambaConfig) -> nn.RMSNorm | nn.LayerNorm:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.d_model, eps=config.rms_eps)


def normed(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in float32, in its weight's dtype."""
    if offloads(norm):
        with at_hand(norm):
            return _normed(norm, x)
    return _normed(norm, x)


def _normed(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    if (y := fused_norm(norm, x)) is not None:
        return y
    weight, x = norm.weight, x.float()
    if isinstance(norm, nn.LayerNorm):
        normed = F.layer_norm(x, weight.shape, weight.float(), norm.bias.float(), norm.eps)
    else:
        normed = F.rms_norm(x, weight.shape, weight.float(), norm.eps)
    return normed.to(weight.dtype)


class Block(GradientCheckpointingLayer):
    """Pre-norm residual block: x + layer(norm(x)); the residual stream stays in float32."""

    def __init__(self, config: MambaConfig, layer: Layer):
        super().__init__()
        self.norm = build_norm(config)
        self.mixer = layer
        self.residual_in_fp32 = config.residual_in_fp32

    def _norm(self, x: Tensor) -> Tensor:
        return normed(self.norm, x)

    def _residual(self, x: Tensor) -> Tensor:
        return x.float() if self.residual_in_fp32 else x


class MambaBlock(Block):
    """One around a Mamba layer."""

    mixer: Mixer

    def __init__(self, config: MambaConfig):
        super().__init__(config, MIXERS[config.recurrent](config))

    def forward(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        recompute: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D) and the two states, as MambaMixer.forward."""
        again = recompute and not self.gradient_checkpointing  # else the block runs again anyway
        y, conv_state, ssm_state = self.mixer(self._norm(x), conv_state, ssm_state, lengths, again)
        return residual_sum(self._residual(x), y), conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); states in place."""
        if offloads(self.mixer):
            with at_hand(self.mixer, *self.mixer.read_bare()):
                return self._residual(x) + self.mixer.step(self._norm(x), conv_state, ssm_state)
        residual = self._residual(x)
        y = fused_step(self.norm, self.mixer, residual, conv_state, ssm_state)
        return residual + self.mixer.step(self._norm(x), conv_state, ssm_state) if y is None else y


class AttentionBlock(Block):
    """One around an attention layer."""

    mixer: CausalAttention

    def __init__(self, config: MambaConfig):
        super().__init__(config, CausalAttention(config))

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D), keys and values, as CausalAttention.forward."""
        y, keys, values = self.mixer(self._norm(x), past, lengths)
        return residual_sum(self._residual(x), y), keys, values

    def step(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); keys and values in place."""
        return self._residual(x) + self.mixer.step(self._norm(x), keys, values, lengths)


class MLPBlock(Block):
    """One around an MLP."""

    def __init__(self, config: MambaConfig):
        super().__init__(config, GatedMLP(config))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self._residual(x) + self.mixer(self._norm(x))


class ExpertsBlock(Block):
    """One around a mixture of experts."""

    def __init__(self, config: MambaConfig):
        super().__init__(config, Experts(config))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D); lengths as Experts.forward."""
        return self._residual(x) + self.mixer(self._norm(x), lengths)


BLOCKS: dict[str, Callable[[MambaConfig], Block]] = {
    "mamba": MambaBlock,
    "mamba2": MambaBlock,
    "attention": AttentionBlock,
    "mlp": MLPBlock,
    "experts": ExpertsBlock,
}
