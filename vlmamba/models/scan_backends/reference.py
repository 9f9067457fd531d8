"""The selective scan as its equations read: one Python step per token (Mamba, Algorithm 2).

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t          y_t = (C_t h_t + D u_t) silu(z_t)

Slow and plain on purpose: the other backends are tested against this one, in float64. Autograd
differentiates it as it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64 input, float32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def real_steps(lengths: Tensor | None, length: int, device: torch.device) -> Tensor:
    """(B, L, 1) bool, or (1, L, 1) without `lengths`: True where a step is not padding."""
    if lengths is None:
        return torch.ones(1, length, 1, dtype=torch.bool, device=device)
    return (torch.arange(length, device=device) < lengths.to(device)[:, None])[..., None]


def step_sizes(delta, delta_bias, delta_softplus, lengths) -> Tensor:
    """delta as the recurrence uses it, (B, L, Di); 0 at padding, where the state then stays."""
    delta = delta.to(wide_dtype(delta))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    return delta.masked_fill(~real_steps(lengths, delta.shape[1], delta.device), 0.0)


def finish(y, u, D, z, lengths) -> Tensor:
    """Skip connection, gate, zeros at padding: y, u, z (B, L, Di), D (Di,); result in u.dtype."""
    if D is not None:
        y = y + D * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.masked_fill(~real_steps(lengths, y.shape[1], y.device), 0.0).to(u.dtype)


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(u)
    steps = step_sizes(delta, delta_bias, delta_softplus, lengths).to(dtype)
    A, B, C, x = A.to(dtype), B.to(dtype), C.to(dtype), u.to(dtype)
    h = x.new_zeros(*A.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        dt = steps[:, t, :, None]  # (B, Di, 1) against A (Di, N) and B_t (B, 1, N)
        h = torch.exp(dt * A) * h + dt * B[:, t, None, :] * x[:, t, :, None]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    return finish(torch.stack(outputs, dim=1), u, D, z, lengths), h


def selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    with torch.no_grad():
        one = [x if x is None else x[:, None] for x in (u, delta, B, C, z)]
        u, delta, B, C, z = one
        y, h = selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, lengths=None
        )
        state.copy_(h)
    return y[:, 0]


def causal_conv1d(x, weight, bias, initial_state, lengths, activation) -> tuple[Tensor, Tensor]:
    """y_t = sum_k weight[:, k] x_{t-K+1+k}, where x_{-K+1..-1} is the initial state."""
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch, past, channels)
    inputs = torch.cat([initial_state.to(x.dtype), x], dim=1)
    wide = inputs.to(wide_dtype(x))
    y = sum(weight[:, k] * wide[:, k : k + length] for k in range(past + 1))
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    y = y.masked_fill(~real_steps(lengths, length, x.device), 0.0).to(x.dtype)
    return y, last_inputs(inputs, past, lengths)


def last_inputs(inputs: Tensor, past: int, lengths: Tensor | None) -> Tensor:
    """The `past` inputs before each row's end; inputs (B, past + L, Di) begin with a state."""
    if lengths is None:
        return inputs[:, inputs.shape[1] - past :].clone()  # a view would keep all inputs alive
    last = lengths.to(inputs.device)[:, None] + torch.arange(past, device=inputs.device)
    return inputs.gather(1, last[..., None].expand(-1, -1, inputs.shape[2]))


def causal_conv1d_step(state, x, weight, bias, activation) -> Tensor:
    with torch.no_grad():
        y, after = causal_conv1d(x[:, None], weight, bias, state, None, activation)
        state.copy_(after)
    return y[:, 0]
