"""mamba-ssm and causal-conv1d (extra `cuda`) behind the common interface, on NVIDIA GPUs.

Their scan is channel-first, starts from zeros and knows no lengths. Padding gets a step size of
0, which leaves a state as it is. An initial state is written by N tokens ahead of the sequence:
token n has B = e_n, step size 2^-64 and input 2^64 h_n, so that it adds exactly h_n to state n
and its decay exp(2^-64 A) is exactly 1. Both are computed in float32; without them the dtype of
`u` is kept. float64, and more states or taps than they take, go to PyTorch.
"""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from torch import Tensor

from vlmamba.models.scan_backends import torch_ops
from vlmamba.models.scan_backends.reference import last_inputs, real_steps, step_sizes

_TINY = 2.0**-64
_MOST_STATES = 256
STATE_HAS_GRADIENT = False


class _NoGradient(torch.autograd.Function):
    """mamba-ssm ignores a gradient of the last state; this refuses it instead."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "scan backend 'cuda' has no gradient through final_state; use backend='torch'"
        )


def _write_state(state: Tensor, u, delta, B, C, z) -> tuple[Tensor | None, ...]:
    """The sequence (B, L, ...) in float32, behind N tokens that write `state` (B, Di, N)."""
    x = state.float().mT / _TINY  # (B, N, Di)
    unit = torch.eye(state.shape[2], device=state.device).expand(len(state), -1, -1)
    ahead = (x, torch.full_like(x, _TINY), unit, torch.zeros_like(unit), torch.zeros_like(x))
    return tuple(
        None if s is None else torch.cat([a, s.float()], dim=1)
        for a, s in zip(ahead, (u, delta, B, C, z), strict=True)
    )


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
) -> tuple[Tensor, Tensor]:
    if not _scans(u, A):
        return torch_ops.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
        )
    length, dtype, written = u.shape[1], u.dtype, 0
    if initial_state is not None or lengths is not None:
        delta = step_sizes(delta, delta_bias, delta_softplus, lengths)
        delta_bias, delta_softplus = None, False
        if initial_state is None:
            initial_state = delta.new_zeros(len(u), *A.shape)
        written = A.shape[1]
        u, delta, B, C, z = _write_state(initial_state, u, delta, B, C, z)
    u, delta, B, C, z = (None if x is None else x.to(u.dtype).mT for x in (u, delta, B, C, z))
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    y, final_state = selective_scan_fn(
        u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus, return_last_state=True
    )
    y = y.mT[:, written:].masked_fill(~real_steps(lengths, length, u.device), 0.0)
    return y.to(dtype), _NoGradient.apply(final_state)


def selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    if not _scans(state, A):
        return torch_ops.selective_scan_step(
            state, u, delta, A, B, C, D, z, delta_bias, delta_softplus
        )
    # mamba-ssm reads the strides of both, which None has not
    D, delta_bias = (A.new_zeros(len(A)) if x is None else x for x in (D, delta_bias))
    with torch.no_grad():
        return selective_state_update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _scans(x: Tensor, A: Tensor) -> bool:
    """mamba-ssm takes float32 and narrower, and so many states."""
    return x.dtype != torch.float64 and A.shape[1] <= _MOST_STATES


def _convolves(x: Tensor, weight: Tensor) -> bool:
    """causal-conv1d takes float32 and narrower, 2 to 4 taps, and multiples of 8 channels."""
    return x.dtype != torch.float64 and 2 <= weight.shape[1] <= 4 and weight.shape[0] % 8 == 0


def causal_conv1d(x, weight, bias, initial_state, lengths, activation) -> tuple[Tensor, Tensor]:
    if not _convolves(x, weight):
        return torch_ops.causal_conv1d(x, weight, bias, initial_state, lengths, activation)
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(len(x), past, x.shape[2])
    inputs = torch.cat([initial_state.to(x.dtype), x], dim=1)
    y = causal_conv1d_fn(inputs.mT, weight, bias, activation=activation).mT[:, past:]
    y = y.masked_fill(~real_steps(lengths, x.shape[1], x.device), 0.0)
    return y, last_inputs(inputs, past, lengths)


def causal_conv1d_step(state, x, weight, bias, activation) -> Tensor:
    if not _convolves(x, weight):
        return torch_ops.causal_conv1d_step(state, x, weight, bias, activation)
    with torch.no_grad():
        return causal_conv1d_update(x, state.mT, weight, bias, activation)
