"""The Mamba language model, and its state as a value.

A whole model state is a `MambaState`, which can be cloned, gathered and resumed; right-padded rows
leave it untouched.  `config.mixer` chooses the layer of every block: Mamba's or Mamba-2's
(vlmamba.models.mixers).  Sizes: B batch, L sequence, D d_model, Di d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmamba import registry
from vlmamba.config import MambaConfig
from vlmamba.models.language.base import Cache, LanguageModel
from vlmamba.models.language.mamba_config import (
    check_agreement,
    published_fields,
    take_results_only,
)
from vlmamba.models.language.mamba_weights import fill
from vlmamba.models.linear import Linear
from vlmamba.models.mixers import MIXERS
from vlmamba.published import published_folder


@dataclass
class MambaState(Cache):
    """What a Mamba model remembers of a sequence; constant in size whatever its length.

    conv: (n_layer, B, K-1, Di), the last K-1 inputs of each convolution.
    ssm: (n_layer, B, Di, N) float32, the scan's hidden state.  (Mamba-2: see its state_shapes.)
    positions: how many columns of input (padding included) made it; transformers asks for it.
    """

    conv: Tensor
    ssm: Tensor
    positions: int = 0

    @classmethod
    def zeros(
        cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> MambaState:
        """The state before the first token."""
        conv, ssm = MIXERS[config.mixer].state_shapes(config)
        return cls(
            torch.zeros((config.n_layer, batch, *conv), dtype=dtype, device=device),
            torch.zeros((config.n_layer, batch, *ssm), dtype=torch.float32, device=device),
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.conv.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the state in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.conv, self.ssm))

    def clone(self) -> MambaState:
        """An independent copy."""
        return MambaState(self.conv.clone(), self.ssm.clone(), self.positions)

    def select(self, rows: Tensor) -> MambaState:
        """A new state with the given rows (int64 indices; repeats allowed)."""
        rows = rows.to(self.conv.device)
        return MambaState(self.conv[:, rows], self.ssm[:, rows], self.positions)

    def write_rows(self, rows: Tensor, other: MambaState) -> None:
        """Replace the given rows by those of `other`, in place."""
        self.conv[:, rows], self.ssm[:, rows] = other.conv, other.ssm
        self.positions = max(self.positions, other.positions)

    def write(self, other: MambaState) -> None:
        """Take over the content of `other`, in place where the shapes agree."""
        if self.conv.shape == other.conv.shape:
            self.conv.copy_(other.conv)
            self.ssm.copy_(other.ssm)
        else:
            self.conv, self.ssm = other.conv, other.ssm
        self.positions = other.positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input consumed so far."""
        return self.positions

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.conv.zero_()
        self.ssm.zero_()
        self.positions = 0


def _build_norm(config: MambaConfig) -> nn.RMSNorm | nn.LayerNorm:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.d_model, eps=config.rms_eps)


def _normed(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm in float32, in its weight's dtype."""
    weight, x = norm.weight, x.float()
    if isinstance(norm, nn.LayerNorm):
        normed = F.layer_norm(x, weight.shape, weight.float(), norm.bias.float(), norm.eps)
    else:
        normed = F.rms_norm(x, weight.shape, weight.float(), norm.eps)
    return normed.to(weight.dtype)


class MambaBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: x + mixer(norm(x)); the residual stream stays in float32."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = _build_norm(config)
        self.mixer = MIXERS[config.mixer](config)
        self.residual_in_fp32 = config.residual_in_fp32

    def _norm(self, x: Tensor) -> Tensor:
        return _normed(self.norm, x)

    def forward(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D) and the two states, as MambaMixer.forward."""
        residual = x.float() if self.residual_in_fp32 else x
        again = not self.gradient_checkpointing  # else the whole block runs again anyway
        y, conv_state, ssm_state = self.mixer(self._norm(x), conv_state, ssm_state, lengths, again)
        return residual + y, conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); states in place."""
        residual = x.float() if self.residual_in_fp32 else x
        return residual + self.mixer.step(self._norm(x), conv_state, ssm_state)


@registry.language_models.add("vlmamba_text")
class MambaLM(LanguageModel):
    """The language model: embedding, n_layer blocks, final norm, tied output head."""

    block_names = ("MambaBlock",)
    lora_targets = ("in_proj", "x_proj", "out_proj")  # dt_proj is read as a bare matrix by the scan
    tied_weights = {"lm_head.weight": "embedding.weight"}  # noqa: RUF012  # if the config says so
    config: MambaConfig

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = _build_norm(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)

    def new_cache(self, batch: int) -> MambaState:
        """The state before the first token, on the model's device and in its dtype."""
        weight = self.embedding.weight
        return MambaState.zeros(self.config, batch, weight.dtype, weight.device)

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: MambaState | None = None,
        lengths: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, MambaState]:
        """(B, L, D) embeddings, continued from `cache` -> (B, L, D) hidden states, new state.

        `lengths` (B,) int64: each right-padded row's real tokens; the state is taken at each
        row's own last one, and stays as it was where a row has none.  `collect` receives every
        layer's input (hidden states).
        """
        x = inputs_embeds
        conv_states, ssm_states = [], []
        for n, layer in enumerate(self.layers):
            if collect is not None:
                collect.append(x)
            conv, ssm = (None, None) if cache is None else (cache.conv[n], cache.ssm[n])
            x, conv, ssm = layer(x, conv, ssm, lengths)
            conv_states.append(conv)
            ssm_states.append(ssm)
        positions = inputs_embeds.shape[1] + (0 if cache is None else cache.positions)
        new_state = MambaState(torch.stack(conv_states), torch.stack(ssm_states), positions)
        return self._final_norm(x), new_state

    def step(self, inputs_embeds: Tensor, cache: MambaState) -> Tensor:
        """One token: (B, D) -> (B, D) hidden; `cache` is updated in place."""
        x = inputs_embeds
        for n, layer in enumerate(self.layers):
            # a ModuleList does not say what its modules are
            x = layer.step(x, cache.conv[n], cache.ssm[n])  # type: ignore[operator]
        cache.positions += 1
        return self._final_norm(x)

    def _final_norm(self, x: Tensor) -> Tensor:
        return _normed(self.norm_f, x)

    @classmethod
    def take_published_settings(
        cls, config: MambaConfig, source: str | Path, **options: Any
    ) -> None:
        """Norms' epsilon and the residual's precision; UserError where the rest is another's."""
        published = published_fields(published_folder(source, **options))
        take_results_only(config, published)
        check_agreement(config, published, source)

    def load_published(self, source: str | Path, **options: Any) -> None:
        """Fill the weights from a published checkpoint of either layout (see `mamba_weights`).

        Raises UserError for keys that are missing, unknown or ill-shaped, and for settings of its
        config.json that are not the model's.
        """
        folder = published_folder(source, **options)
        check_agreement(self.config, published_fields(folder), source)
        fill(self, folder, source)

    def flops(self, tokens: int) -> float:
        """Every layer's matrices and scan; A_log is a matrix of no product."""
        mixer = cast(MambaBlock, self.layers[0]).mixer
        named = mixer.named_parameters()
        matrices = sum(p.numel() for name, p in named if p.ndim >= 2 and name != "A_log")
        return self.config.n_layer * tokens * (2 * matrices + mixer.scan_flops())

    def activation_bytes(self, dtype: torch.dtype, checkpointing: bool) -> tuple[int, int]:
        """Per layer the float32 residual, of its norm and first projection what their own weights'
        gradients need, and the mixer's share; with checkpointing the residual alone.  At the peak
        what the layer at work makes again."""
        element, residual = dtype.itemsize, 4 * self.config.d_model
        block = cast(MambaBlock, self.layers[0])
        trainable = {name for name, p in block.named_parameters() if p.requires_grad}
        kept, at_work = block.mixer.activation_bytes(element)
        layer = residual + kept
        layer += residual if "norm.weight" in trainable else 0
        layer += element * self.config.d_model if any("in_proj" in n for n in trainable) else 0
        at_work += 2 * residual
        ends = 3 * residual  # embeddings, the last residual and its norm
        if checkpointing:
            layer, at_work = residual, at_work + layer
        return self.config.n_layer * layer + ends, at_work
