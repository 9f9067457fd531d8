"""Triton kernels behind the common interface: NVIDIA and AMD GPUs, nothing to build beforehand.

Triton comes with PyTorch and compiles the kernels of `triton_scan` and `triton_conv` at their first
call. It needs a C compiler, any, for its own start-up stub, and no CUDA toolkit (no nvcc). Every
dtype is read as it is; sums and states are float32 (float64 for float64 input). Results do not
depend on the batch a row is in. With TRITON_INTERPRET=1, set before Triton is imported, the same
code runs on CPU tensors, slowly: that is how the kernels are tested where there is no GPU.

On a GPU: not run, and no speed measured; compiled for compute capabilities 8.0 and 9.0 only. That
is why "auto" asks `check.check_on` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.models.scan_backends.triton_conv import Conv, conv_forward, conv_step
from vlmamba.models.scan_backends.triton_scan import Scan, dense_rows, scan_forward, scan_step


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def row_lengths(lengths: Tensor | None, device: torch.device) -> Tensor | None:
    return None if lengths is None else lengths.to(device, torch.int32).contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
) -> tuple[Tensor, Tensor]:
    u, delta, B, C, z = (dense_rows(x) for x in (u, delta, B, C, z))
    A, D, delta_bias, initial_state = (_dense(x) for x in (A, D, delta_bias, initial_state))
    lengths = row_lengths(lengths, u.device)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if needs_grad(*tensors):
        return Scan.apply(lengths, delta_softplus, *tensors)
    return scan_forward(*tensors, lengths, delta_softplus)[:2]


@torch.no_grad()
def selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    h = state.contiguous()
    u, delta, B, C, z = (dense_rows(x) for x in (u, delta, B, C, z))
    A, D, delta_bias = (_dense(x) for x in (A, D, delta_bias))
    y = scan_step(h, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if h is not state:
        state.copy_(h)
    return y


def causal_conv1d(x, weight, bias, initial_state, lengths, activation) -> tuple[Tensor, Tensor]:
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    tensors = (dense_rows(x), _dense(weight), _dense(bias), state)
    lengths, silu = row_lengths(lengths, x.device), activation == "silu"
    if needs_grad(*tensors):
        return Conv.apply(lengths, silu, *tensors)
    return conv_forward(*tensors, lengths, silu)


@torch.no_grad()
def causal_conv1d_step(state, x, weight, bias, activation) -> Tensor:
    past = state.contiguous()
    y = conv_step(past, x, _dense(weight), _dense(bias), activation == "silu")
    if past is not state:
        state.copy_(past)
    return y
