"""The selective scan in vectorised PyTorch: any device, no compiler, no Python loop over time.

The sequence is cut into about sqrt(L) chunks of about sqrt(L) steps, and every loop runs over all
chunks at once. Three short loops: each chunk from a zero state, for its last state; the carry from
chunk to chunk; each chunk again from its true first state, for the outputs. Only products of decays
exp(delta A) <= 1 occur, so nothing overflows, which the shorter cumulative-sum forms do not give.

The convolution and the single-token steps of `reference` have no loop over time and serve here too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmamba.models.scan_backends.reference import (
    causal_conv1d,
    causal_conv1d_step,
    finish,
    selective_scan_step,
    step_sizes,
    wide_dtype,
)

__all__ = ["causal_conv1d", "causal_conv1d_step", "selective_scan", "selective_scan_step"]


def _chunked(x: Tensor, chunks: int, size: int) -> Tensor:
    """(B, L, F) -> (size, B, chunks, F); the end is filled with zeros (delta = 0: no step)."""
    x = F.pad(x, (0, 0, 0, chunks * size - x.shape[1]))
    return x.unflatten(1, (chunks, size)).movedim(2, 0)


def _carry(first: Tensor, decay: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """States at chunk starts (B, chunks, Di, N) and after the last; decay, gain: one per chunk."""
    states = [first]
    for c in range(decay.shape[1]):
        states.append(decay[:, c] * states[-1] + gain[:, c])
    return torch.stack(states[:-1], dim=1), states[-1]


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(u)
    batch, length, channels = u.shape
    size = math.ceil(math.sqrt(length))
    chunks = math.ceil(length / size)
    A = A.to(dtype)
    steps = step_sizes(delta, delta_bias, delta_softplus, lengths).to(dtype)
    dt, x, b, c = (_chunked(t.to(dtype), chunks, size) for t in (steps, u, B, C))

    def advance(h: Tensor, s: int) -> Tensor:
        """One step of every chunk: h (B, chunks, Di, N)."""
        drive = (dt[s] * x[s])[..., None] * b[s][..., None, :]
        return torch.exp(dt[s][..., None] * A) * h + drive

    gain = x.new_zeros(batch, chunks, channels, A.shape[1])
    for s in range(size):
        gain = advance(gain, s)
    first = torch.zeros_like(gain[:, 0]) if initial_state is None else initial_state.to(dtype)
    h, final_state = _carry(first, torch.exp(dt.sum(0)[..., None] * A), gain)
    outputs = []
    for s in range(size):
        h = advance(h, s)
        outputs.append(torch.einsum("bkdn,bkn->bkd", h, c[s]))
    y = torch.stack(outputs, dim=2).flatten(1, 2)[:, :length]
    return finish(y, u, D, z, lengths), final_state
