"""A Mamba language model's state as a value.

Sizes: B batch, Di d_inner, N d_state, K d_conv.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmamba.configs.language import MambaConfig
from vlmamba.models.language.base import Cache
from vlmamba.models.mixers import MIXERS
from vlmamba.models.mixers.attention import KeyValues


@dataclass
class MambaState(Cache):
    """What a Mamba model remembers of a sequence; constant in size whatever its length.

    conv: (Mamba layers, B, K-1, Di), the last K-1 inputs of each convolution.
    ssm: (Mamba layers, B, Di, N) float32, the scan's hidden state (Mamba-2: its state_shapes).
    positions: how many columns of input (padding included) made it; transformers asks for it.
    attention: what attention layers remember, which grows; None where there are none.
    pictured: (B,) bool, which rows hold a picture; None unless there are inner adaptors, whose
    states follow those of the Mamba layers in conv and ssm.
    """

    conv: Tensor
    ssm: Tensor
    positions: int = 0
    attention: KeyValues | None = None
    pictured: Tensor | None = None

    @classmethod
    def zeros(
        cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> MambaState:
        """The state before the first token."""
        conv, ssm = MIXERS[config.recurrent].state_shapes(config)
        layers = config.layer_kinds.count(config.recurrent) + len(config.adaptors)
        attends = "attention" in config.layer_kinds
        return cls(
            torch.zeros((layers, batch, *conv), dtype=dtype, device=device),
            torch.zeros((layers, batch, *ssm), dtype=torch.float32, device=device),
            attention=KeyValues.zeros(config, batch, dtype, device) if attends else None,
            pictured=torch.zeros(batch, dtype=torch.bool, device=device)
            if config.adaptors
            else None,
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.conv.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the state in bytes."""
        grows = 0 if self.attention is None else self.attention.nbytes
        return sum(t.numel() * t.element_size() for t in (self.conv, self.ssm)) + grows

    def clone(self) -> MambaState:
        """An independent copy."""
        attention = None if self.attention is None else self.attention.clone()
        pictured = None if self.pictured is None else self.pictured.clone()
        return MambaState(self.conv.clone(), self.ssm.clone(), self.positions, attention, pictured)

    def select(self, rows: Tensor) -> MambaState:
        """A new state with the given rows (int64 indices; repeats allowed)."""
        rows = rows.to(self.conv.device)
        attention = None if self.attention is None else self.attention.select(rows)
        pictured = None if self.pictured is None else self.pictured[rows]
        conv, ssm = self.conv[:, rows], self.ssm[:, rows]
        return MambaState(conv, ssm, self.positions, attention, pictured)

    def write_rows(self, rows: Tensor, other: MambaState) -> None:
        """Replace the given rows by those of `other`, in place."""
        self.conv[:, rows], self.ssm[:, rows] = other.conv, other.ssm
        if self.attention is not None and other.attention is not None:
            self.attention.write_rows(rows, other.attention)
        if self.pictured is not None and other.pictured is not None:
            self.pictured = self.pictured.index_copy(0, rows, other.pictured)
        self.positions = max(self.positions, other.positions)

    def write(self, other: MambaState) -> None:
        """Take over the content of `other`, in place where the shapes agree and nobody learns.

        A backward pass, and layers that it runs again, still want what was there before.
        """
        learns = other.conv.requires_grad or other.ssm.requires_grad
        if self.conv.shape == other.conv.shape and not learns:
            self.conv.copy_(other.conv)
            self.ssm.copy_(other.ssm)
        else:
            self.conv, self.ssm = other.conv, other.ssm
        self.positions, self.attention = other.positions, other.attention
        self.pictured = other.pictured

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input consumed so far."""
        return self.positions

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.conv.zero_()
        self.ssm.zero_()
        if self.attention is not None:
            self.attention.lengths.zero_()
        if self.pictured is not None:
            self.pictured.zero_()
        self.positions = 0
