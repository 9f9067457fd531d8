"""Causal self-attention with rotary positions, and what it remembers: every key and value.

    q, k, v = in_proj(u), per head;  q, k turned by their position (rotary)
    y_t     = sum_s softmax_s(q_t k_s / sqrt(P)) v_s,  s <= t;  out_proj(y)

(Vaswani et al., 1706.03762, with the rotary positions of Su et al., 2104.09864, as Llama has them:
the first half of a head's channels is turned with the second.)  A row's token n is kept in column
n of its cache, whatever its neighbors' lengths: a query sees the columns up to its own, so that
what stands behind a row's last token, padding or old content, is never seen.

Sizes: B batch, L new tokens, T columns of the cache, D d_model, H heads of P channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.configs.language import MambaConfig
from vlmamba.models.linear import Linear
from vlmamba.models.mixers.base import Layer

ROTARY_BASE = 10000.0
ROOM = 64  # columns that a full cache grows by while decoding


@dataclass
class KeyValues:
    """keys, values: (attention layers, B, T, H, P).  lengths (B,) int64: real tokens of each row.

    T is at least the longest row's length.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def zeros(
        cls, config: MambaConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> KeyValues:
        """Nothing seen yet, in `batch` rows."""
        layers, heads = config.layer_kinds.count("attention"), config.d_model // config.head_dim
        empty = torch.zeros((layers, batch, 0, heads, config.head_dim), dtype=dtype, device=device)
        return cls(empty, empty.clone(), torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def nbytes(self) -> int:
        """Memory of keys and values in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def clone(self) -> KeyValues:
        """An independent copy."""
        return KeyValues(self.keys.clone(), self.values.clone(), self.lengths.clone())

    def select(self, rows: Tensor) -> KeyValues:
        """A new cache with the given rows (int64 indices; repeats allowed)."""
        return KeyValues(self.keys[:, rows], self.values[:, rows], self.lengths[rows])

    def write_rows(self, rows: Tensor, other: KeyValues) -> None:
        """Replace the given rows by those of `other`; both get the same number of columns."""
        columns = max(self.keys.shape[2], other.keys.shape[2])
        source = KeyValues(other.keys, other.values, other.lengths)
        for cache in (self, source):
            cache.resize(columns)
        self.keys[:, rows], self.values[:, rows] = source.keys, source.values
        self.lengths = self.lengths.index_copy(0, rows, source.lengths)

    def resize(self, columns: int) -> None:
        """Cut the tensors to T = columns, or fill them up with zeros."""
        missing = columns - self.keys.shape[2]
        if missing:
            self.keys, self.values = (
                F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (self.keys, self.values)
            )


class CausalAttention(Layer):
    """One attention layer without norm and residual; projections are named as a Mamba layer's."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.head_dim, self.n_heads = config.head_dim, config.d_model // config.head_dim
        self.in_proj = Linear(config.d_model, 3 * config.d_model, bias=False)  # q, k, v
        self.out_proj = Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        u: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D), and keys and values (B, T, H, P) with the new ones in place.

        past: those of before, with room for L columns behind every row's `lengths` (B,).  Without
        it T is L.  Padding on the right needs no mask: nothing real sees it.
        """
        columns = torch.arange(u.shape[1], device=u.device)
        positions = columns.unsqueeze(0) if lengths is None else lengths.unsqueeze(1) + columns
        q, keys, values = self._turned(self.in_proj(u), positions)
        mask = None
        if past is not None:
            places = positions.expand(len(u), -1)[..., None, None].expand_as(keys)
            keys, values = (
                old.to(new.dtype).scatter(1, places, new)
                for old, new in zip(past, (keys, values), strict=True)
            )
            mask = _visible(positions, keys.shape[1])
        return self.out_proj(_attended(q, keys, values, mask)), keys, values

    def step(self, u: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); keys and values (B, T, H, P) get its own, in place."""
        positions = lengths.unsqueeze(1)
        q, k, v = self._turned(self.in_proj(u).unsqueeze(1), positions)
        rows = torch.arange(len(u), device=u.device)
        keys[rows, lengths], values[rows, lengths] = k[:, 0].to(keys), v[:, 0].to(values)
        mask = _visible(positions, keys.shape[1])
        return self.out_proj(_attended(q, keys.to(q), values.to(q), mask).squeeze(1))

    def inner_flops(self, tokens: int) -> float:
        """Scores and their product with v of one sequence; a token sees half of it on average."""
        return 2.0 * tokens * tokens * self.n_heads * self.head_dim

    def activation_bytes(self, element: int) -> tuple[int, int]:
        """q, k, v, their turned copies, y and its norm's logarithm a head."""
        width = self.n_heads * self.head_dim
        return (6 * width) * element + 4 * self.n_heads, 2 * width * element

    def _turned(self, projected: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, 3 D) -> q, k, v (B, L, H, P), q and k turned."""
        q, k, v = projected.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        return rotated(q, positions), rotated(k, positions), v


def _attended(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, L, H, P), keys and values (B, T, H, P) -> (B, L, D), the heads side by side."""
    q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    y = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=mask is None)
    return y.transpose(1, 2).flatten(-2)


def _visible(positions: Tensor, columns: int) -> Tensor:
    """(B, 1, L, T) bool: the columns up to each query's own."""
    return torch.arange(columns, device=positions.device) <= positions[:, None, :, None]


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, L, H, P) turned by its positions (B or 1, L): rotary embedding, in float32."""
    half = x.shape[-1] // 2
    speed = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = (positions.unsqueeze(-1) * speed).unsqueeze(-2)  # (B, L, 1, P/2)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().split(half, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
