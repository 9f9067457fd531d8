"""Whether kernels of a GPU run and compute what PyTorch does, asked once before they are used."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from vlmamba.models.scan_backends import torch_ops

STEPS = 67  # of the check's sequence: two chunks of the Triton kernels
TRUSTED = 1e-3  # of the largest value; float32 gives 1e-6, a wrong index or a missing barrier 1


def fault_of(name: str, device: torch.device) -> str:
    """Why the backend is not to be used on `device`; "" if it runs and equals PyTorch's."""
    try:
        module = importlib.import_module(f"vlmamba.models.scan_backends.{name}")
    except Exception as error:  # another release's names, another compiler's libraries
        return _said(error)
    return check_on(module, device)


def check_on(module: ModuleType, device: torch.device) -> str:
    """Why a backend's kernels are not to be used on `device`; "" if they equal PyTorch's.

    A random scan and convolution of STEPS steps and two rows, with states, lengths and gradients,
    against `torch_ops` in float64 on the CPU.  The gradients are of the outputs, and of the last
    states unless the backend says that it has none of these (`STATE_HAS_GRADIENT`).
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for name, error in _errors_on(module, device):
                if not error < TRUSTED:  # NaN too
                    return f"the relative error of {name} is {error:.1e} on {device.type}"
    except Exception as error:  # a compiler's, a driver's or Triton's own: all mean PyTorch
        return _said(error)
    return ""


def _said(error: Exception) -> str:
    reason = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {reason[0]}"


def _errors_on(module: ModuleType, device: torch.device) -> Iterator[tuple[str, float]]:
    """The relative error of each output and gradient of `check_on`, with its name."""
    rng = torch.Generator("cpu").manual_seed(0)
    batch, length, channels, states, taps = 2, STEPS, 32, 16, 4  # Mamba's N and K

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cpu", dtype=torch.float64)

    row, state = (batch, length, channels), (batch, length, states)
    rates, vector = -draw(channels, states).abs() - 0.1, (channels,)
    scan = [draw(*row), draw(*row), rates, draw(*state), draw(*state), draw(*vector), draw(*row)]
    scan += [draw(*vector), draw(batch, channels, states)]
    conv = [draw(*row), draw(channels, taps), draw(*vector), draw(batch, taps - 1, channels)]
    lengths = torch.tensor([length, length // 2], device="cpu")
    counted = 2 if getattr(module, "STATE_HAS_GRADIENT", True) else 1

    def run_scan(module, u, delta, A, B, C, D, z, bias, first):
        there = lengths.to(u.device)
        return module.selective_scan(u, delta, A, B, C, D, z, bias, True, first, there)

    def run_conv(module, x, weight, bias, first):
        return module.causal_conv1d(x, weight, bias, first, lengths.to(x.device), "silu")

    for name, run, inputs in (("the scan", run_scan, scan), ("the convolution", run_conv, conv)):
        found = []
        for one, kind in ((torch_ops, inputs[0]), (module, _narrow(device))):
            leaves = [x.to(kind).detach().clone().requires_grad_() for x in inputs]
            outputs = run(one, *leaves)
            grads = torch.autograd.grad(sum((y * y).sum() for y in outputs[:counted]), leaves)
            found.append([x.detach().cpu().double() for x in (*outputs, *grads)])
        for place, (truth, ours) in enumerate(zip(*found, strict=True)):
            part = name if place < 2 else f"{name}'s gradients"
            yield part, float((ours - truth).abs().max() / truth.abs().max())


def _narrow(device: torch.device) -> Tensor:
    return torch.empty(0, device=device, dtype=torch.float32)
