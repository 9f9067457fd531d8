"""mamba-ssm and causal-conv1d (extra `cuda`) behind the common interface, on NVIDIA GPUs.

Their scan is channel-first, starts from zeros and knows no lengths. Padding gets a step size of
0, which leaves a state as it is. An initial state is written by N tokens ahead of the sequence:
token n has B = e_n, step size 2^-64 and input 2^64 h_n, so that it adds exactly h_n to state n
and its decay exp(2^-64 A) is exactly 1. Both are computed in float32; without them the dtype of
`u` is kept.
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


def _state_tokens(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, delta (B, N, Di) and B (B, N, N) of the tokens that write `state` (B, Di, N)."""
    u = state.float().mT / _TINY
    writes = torch.eye(state.shape[2], device=state.device).expand(len(state), -1, -1)
    return u, torch.full_like(u, _TINY), writes


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
) -> tuple[Tensor, Tensor]:
    dtype = u.dtype if initial_state is None and lengths is None else torch.float32
    written = 0 if initial_state is None else initial_state.shape[2]
    if dtype == u.dtype and not written and lengths is None:
        steps = delta
    else:
        steps = step_sizes(delta, delta_bias, delta_softplus, lengths)
        delta_bias, delta_softplus = None, False
    sequence = [None if x is None else x.to(dtype) for x in (u, steps, B, C, z)]
    if written:
        x, tiny, writes = _state_tokens(initial_state)
        unread = [None if t is None else t.new_zeros(*x.shape[:2], t.shape[2]) for t in sequence]
        ahead = [x, tiny, writes, *unread[3:]]
        sequence = [
            None if t is None else torch.cat([a, t], dim=1)
            for a, t in zip(ahead, sequence, strict=True)
        ]
    first = [None if t is None else t.mT for t in sequence]  # channels first, time last
    D, delta_bias = (None if p is None else p.float() for p in (D, delta_bias))
    y, final_state = selective_scan_fn(
        first[0], first[1], A.float(), first[2], first[3], D, first[4],
        delta_bias, delta_softplus, return_last_state=True,
    )  # fmt: skip
    y = y.mT[:, written:].to(u.dtype)
    if lengths is not None:
        y = y.masked_fill(~real_steps(lengths, u.shape[1], u.device), 0.0)
    return y, _NoGradient.apply(final_state)


def selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    with torch.no_grad():
        return selective_state_update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _convolves(weight: Tensor) -> bool:
    """causal-conv1d takes 2 to 4 taps and, channels last, multiples of 8 channels."""
    return 2 <= weight.shape[1] <= 4 and weight.shape[0] % 8 == 0


def causal_conv1d(x, weight, bias, initial_state, lengths, activation) -> tuple[Tensor, Tensor]:
    if not _convolves(weight):
        return torch_ops.causal_conv1d(x, weight, bias, initial_state, lengths, activation)
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(len(x), past, x.shape[2])
    inputs = torch.cat([initial_state.to(x.dtype), x], dim=1)
    y = causal_conv1d_fn(inputs.mT, weight, bias, activation=activation).mT[:, past:]
    y = y.masked_fill(~real_steps(lengths, x.shape[1], x.device), 0.0)
    return y, last_inputs(inputs, past, lengths)


def causal_conv1d_step(state, x, weight, bias, activation) -> Tensor:
    if not _convolves(weight):
        return torch_ops.causal_conv1d_step(state, x, weight, bias, activation)
    with torch.no_grad():
        return causal_conv1d_update(x, state.mT, weight, bias, activation)
