"""Triton kernels behind the common interface: NVIDIA and AMD GPUs, nothing to build beforehand.

Triton comes with PyTorch and compiles the kernels of `triton_scan` and `triton_conv` at their first
call. It needs a C compiler, any, for its own start-up stub, and no CUDA toolkit (no nvcc). Every
dtype is read as it is; sums and states are float32 (float64 for float64 input). Results do not
depend on the batch a row is in. With TRITON_INTERPRET=1, set before Triton is imported, the same
code runs on CPU tensors, slowly: that is how the kernels are tested where there is no GPU.

On a GPU: not run, and no speed measured; compiled for compute capabilities 8.0 and 9.0 only. That
is why "auto" asks `check_on` first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from vlmamba.models.scan_backends import torch_ops, triton_scan
from vlmamba.models.scan_backends.triton_conv import Conv, conv_forward, conv_step
from vlmamba.models.scan_backends.triton_scan import Scan, dense_rows, scan_forward, scan_step

TRUSTED = 1e-3  # of the largest value; float32 gives 1e-6, a wrong index or a missing barrier 1


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


def check_on(device: torch.device) -> str:
    """Why these kernels are not to be used on `device`; "" if they run and equal PyTorch's.

    A random scan and convolution of two chunks and two rows, with states, lengths and gradients,
    against `torch_ops` in float64 on the CPU.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for name, error in _errors_on(device):
                if not error < TRUSTED:  # NaN too
                    return f"the relative error of {name} is {error:.1e} on {device.type}"
    except Exception as error:  # a compiler's, a driver's or Triton's own: all mean PyTorch
        reason = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {reason[0]}"
    return ""


def _errors_on(device: torch.device) -> Iterator[tuple[str, float]]:
    """The relative error of each output and gradient of `check_on`, with its name."""
    rng = torch.Generator("cpu").manual_seed(0)
    batch, length, channels, states, taps = 2, triton_scan.CHUNK + 3, 32, 16, 4  # Mamba's N and K

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float64)

    row, state = (batch, length, channels), (batch, length, states)
    rates, vector = -draw(channels, states).abs() - 0.1, (channels,)
    scan = [draw(*row), draw(*row), rates, draw(*state), draw(*state), draw(*vector), draw(*row)]
    scan += [draw(*vector), draw(batch, channels, states)]
    conv = [draw(*row), draw(channels, taps), draw(*vector), draw(batch, taps - 1, channels)]
    lengths = torch.tensor([length, length // 2], device="cpu")

    def run_scan(module, u, delta, A, B, C, D, z, bias, first):
        return module.selective_scan(u, delta, A, B, C, D, z, bias, True, first, lengths)

    def run_conv(module, x, weight, bias, first):
        return module.causal_conv1d(x, weight, bias, first, lengths, "silu")

    for name, run, inputs in (("the scan", run_scan, scan), ("the convolution", run_conv, conv)):
        found = []
        for module, kind in ((torch_ops, inputs[0]), (sys.modules[__name__], _narrow(device))):
            leaves = [x.to(kind).detach().clone().requires_grad_() for x in inputs]
            outputs = run(module, *leaves)
            grads = torch.autograd.grad(sum((y * y).sum() for y in outputs), leaves)
            found.append([x.detach().cpu().double() for x in (*outputs, *grads)])
        for place, (truth, ours) in enumerate(zip(*found, strict=True)):
            part = name if place < 2 else f"{name}'s gradients"
            yield part, float((ours - truth).abs().max() / truth.abs().max())


def _narrow(device: torch.device) -> Tensor:
    return torch.empty(0, device=device, dtype=torch.float32)
