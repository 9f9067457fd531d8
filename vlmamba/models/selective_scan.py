"""Mamba's selective scan and short causal convolution, over a sequence and for a single token.

    y, state = selective_scan(u, delta, A, B, C, D, z, delta_bias, lengths=lengths)
    y = selective_scan_step(state, u_t, delta_t, A, B_t, C_t, D, z_t, delta_bias)

One meaning, five backends (`names.SCAN_BACKENDS`); "auto" takes mamba-ssm on a GPU where it is
installed, else the Triton kernels, each where it passes a small check on that GPU, the fused C++
kernel on a CPU that can build it, and vectorised PyTorch otherwise. All start from a given state,
return the state after each row's own last token and treat the rest of the row as absent, which is
what makes continued and right-padded sequences exact.

Shapes: B batch, L steps, Di channels (d_inner), N states per channel, K convolution taps.
Source: Gu and Dao, Mamba (arXiv:2312.00752), section 3 and algorithm 2.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from vlmamba.models.scan_backends.build import kernels
from vlmamba.models.scan_backends.check import fault_of
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import SCAN_BACKENDS

_MODULES = {name: name for name in SCAN_BACKENDS[1:]} | {"torch": "torch_ops"}
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}  # the others run on any
_default = "auto"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (C_t h_t + D u_t) silu(z_t).

    u, delta, z: (B, L, Di); A: (Di, N), negative; B, C: (B, L, N); D, delta_bias: (Di,);
    initial_state: (B, Di, N), zeros if None; lengths: (B,) integers in 0..L, L if None.
    delta is used as softplus(delta + delta_bias), or without the softplus.

    Returns y (B, L, Di) in u's dtype, 0 at padded steps, and the state (B, Di, N) after each row's
    last real step in float32 (float64 for float64 input); a row without one keeps its state.
    Differentiable in every float argument.
    Raises ValueError for a shape or length that does not fit.
    """
    _expect("u", u, (None, None, None))
    _expect("A", A, (u.shape[-1], None))
    (batch, length, channels), n = u.shape, A.shape[1]
    _expect("delta", delta, u.shape)
    _expect("B", B, (batch, length, n))
    _expect("C", C, (batch, length, n))
    _expect("D", D, (channels,))
    _expect("z", z, u.shape)
    _expect("delta_bias", delta_bias, (channels,))
    _expect("initial_state", initial_state, (batch, channels, n))
    _check_lengths(lengths, batch, length)
    return backend_module(backend, u.device).selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
    )


def selective_scan_projected(
    u: Tensor,
    delta: Tensor,
    A_log: Tensor,
    bc: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of a layer's own parameters: A = -exp(A_log), B beside C in bc (B, L, 2N).

    Without gradients the C++ kernels take them as they are: making ready what they read would take
    as long as scanning a short sequence.
    """
    module = backend_module(backend, u.device)
    if hasattr(module, "scan_projected") and not torch.is_grad_enabled():
        _check_lengths(lengths, *u.shape[:2])
        _expect("initial_state", initial_state, (len(u), *A_log.shape))
        scanned = module.scan_projected(
            u, delta, A_log, bc, D, z, delta_bias, initial_state, lengths
        )
        if scanned is not None:
            return scanned
    b, c = bc.chunk(2, dim=-1)
    return selective_scan(
        u,
        delta,
        -torch.exp(A_log.float()),
        b,
        c,
        D,
        z,
        delta_bias,
        initial_state=initial_state,
        lengths=lengths,
        backend=backend,
    )


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """One token of `selective_scan`; `state` (B, Di, N) is updated in place. Not differentiable.

    u, delta, z: (B, Di); B, C: (B, N); the rest as there. Returns y (B, Di).
    """
    batch, channels, n = _expect("state", state, (None, None, None))
    if not (u.shape == delta.shape == (batch, channels) and B.shape == C.shape == (batch, n)):
        raise ValueError(
            f"one token for a state of shape {(batch, channels, n)} needs u and delta of shape "
            f"{(batch, channels)} and B and C of shape {(batch, n)}; "
            f"got {[tuple(x.shape) for x in (u, delta, B, C)]}"
        )
    return backend_module(backend, u.device).selective_scan_step(
        state, u, delta, A, B, C, D, z, delta_bias, delta_softplus
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, then the activation ("silu" or None).

    x: (B, L, Di); weight: (Di, K), its last tap on the current step; bias: (Di,);
    initial_state: (B, K-1, Di), the inputs before x, zeros if None; lengths: as in selective_scan.

    Returns y (B, L, Di), 0 at padded steps, and the last K-1 real inputs (B, K-1, Di), both in x's
    dtype. Differentiable. Raises ValueError for a shape, length or activation that does not fit.
    """
    batch, length, channels = _expect("x", x, (None, None, None))
    _, taps = _expect("weight", weight, (channels, None))
    _expect("bias", bias, (channels,))
    _expect("initial_state", initial_state, (batch, taps - 1, channels))
    _check_lengths(lengths, batch, length)
    _check_activation(activation)
    return backend_module(backend, x.device).causal_conv1d(
        x, weight, bias, initial_state, lengths, activation
    )


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    *,
    backend: str = "auto",
) -> Tensor:
    """One token of `causal_conv1d`: x, y (B, Di); `state` (B, K-1, Di) is updated in place."""
    batch, channels = _expect("x", x, (None, None))
    _, taps = _expect("weight", weight, (channels, None))
    _expect("state", state, (batch, taps - 1, channels))
    _check_activation(activation)
    return backend_module(backend, x.device).causal_conv1d_step(state, x, weight, bias, activation)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let "auto" mean `name` inside the `with` block, in the whole process."""
    global _default
    if name not in SCAN_BACKENDS:
        raise unknown("scan backend", name, SCAN_BACKENDS)
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that `name` stands for on `device`: what a run should record.

    A "cpu" kernel that cannot be built becomes "torch", with one warning that says why; so does
    "auto" on a GPU without mamba-ssm where the Triton kernels do not run or are wrong.
    Raises UserError for an unknown name or one that `device` cannot run.
    """
    return _resolve(_default if name == "auto" else name, torch.device(device).type)


@functools.cache
def _resolve(name: str, device_type: str) -> str:
    if name not in SCAN_BACKENDS:
        raise unknown("scan backend", name, SCAN_BACKENDS)
    if name == "auto" and device_type == "cuda":
        return _fastest_on_a_gpu()
    if name == "auto":
        name = "cpu" if device_type == "cpu" else "torch"
    interpreted = name == "triton" and _is_interpreted()
    if not interpreted and device_type not in _DEVICES.get(name, (device_type,)):
        raise UserError(f"scan backend {name!r} cannot run on {device_type!r} tensors; use 'auto'")
    if name == "cuda":
        if not _installed("mamba_ssm", "causal_conv1d"):
            raise UserError(
                "scan backend 'cuda' needs mamba-ssm and causal-conv1d: "
                "pip install 'vlmamba-harness[cuda]', or use 'triton' or 'torch'"
            )
        if fault := fault_of("cuda", torch.device("cuda")):
            raise UserError(
                f"scan backend 'cuda' does not work as installed ({fault}); use 'triton' or 'torch'"
            )
    if name == "triton" and (missing := _triton_lacks()):
        raise UserError(f"scan backend 'triton' needs {missing}; or use 'torch'")
    return "torch" if name == "cpu" and kernels() is None else name


def _fastest_on_a_gpu() -> str:
    device = torch.device("cuda")
    if _installed("mamba_ssm", "causal_conv1d"):
        fault = fault_of("cuda", device)
        if not fault:
            return "cuda"
        warnings.warn(f"mamba-ssm and causal-conv1d are not used: {fault}", stacklevel=2)
    if missing := _triton_lacks():
        fault = f"they need {missing}"
    else:
        fault = fault_of("triton", device)
    if not fault:
        return "triton"
    warnings.warn(f"the Triton scan kernels are not used, PyTorch is: {fault}", stacklevel=2)
    return "torch"


def _triton_lacks() -> str:
    """What is missing to run Triton's kernels, "" if nothing is."""
    if not _installed("triton"):
        return "the package triton, which comes with PyTorch for GPUs"
    if _is_interpreted() or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return ""
    return "a C compiler (gcc, clang or $CC), with which Triton builds its start-up stub"


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(p) for p in packages)


def _is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _module(name: str, device_type: str) -> ModuleType:
    backend = _MODULES[_resolve(name, device_type)]
    return importlib.import_module(f"vlmamba.models.scan_backends.{backend}")


def backend_module(name: str, device: torch.device) -> ModuleType:
    """The functions of backend `name` for tensors on `device`."""
    return _module(_default if name == "auto" else name, device.type)


def _expect(name: str, x: Tensor | None, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """Check a shape, where None fits any size, and return it; an argument of None passes."""
    if x is None:
        return ()
    if x.ndim != len(shape) or any(w not in (None, s) for w, s in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({wanted})")
    return x.shape


def _check_lengths(lengths: Tensor | None, batch: int, length: int) -> None:
    if length == 0:
        raise ValueError("the sequence has 0 steps, expected at least 1")
    if lengths is None:
        return
    _expect("lengths", lengths, (batch,))
    if lengths.device.type == "cuda" and not lengths.is_floating_point():
        # without waiting for the GPU, which every layer of a prefill would
        torch._assert_async(
            ((lengths >= 0) & (lengths <= length)).all(), f"lengths beyond 0..{length}"
        )
        return
    if lengths.is_floating_point() or int(lengths.min()) < 0 or int(lengths.max()) > length:
        raise ValueError(f"lengths are {lengths.tolist()}, expected integers in 0..{length}")


def _check_activation(activation: str | None) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}, expected 'silu' or None")
