"""The fused C++ kernels of `vlmamba/models/csrc` behind the common interface, with autograd.

float32, bfloat16 and float64 run as they are, with sums in float32 (float64 for float64); other and
mixed dtypes are converted to those of the sums. The scan's backward pass recomputes states from one
checkpoint per 32 steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.models.scan_backends import torch_ops
from vlmamba.models.scan_backends.build import kernels

MAX_TAPS = 16  # of the C++ convolution (kMaxTaps in kernels.h)
_WIDE = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}


def _dtypes(x: Tensor, *others: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the rows, dtype of parameters, states and sums) for a call with these rows."""
    if x.dtype in _WIDE and all(y is None or y.dtype == x.dtype for y in others):
        return x.dtype, _WIDE[x.dtype]
    dtypes = {y.dtype for y in (x, *others) if y is not None}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return wide, wide


def _rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x (..., Di) with contiguous channels; a slice of a wider projection stays as it is."""
    if x is None or (x.dtype == dtype and x.stride(-1) == 1):
        return x
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def selective_scan(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, lengths
) -> tuple[Tensor, Tensor]:
    dtype, wide = _dtypes(u, delta, z)
    tensors = (
        *(_rows(x, dtype) for x in (u, delta)),
        *(_dense(x, wide) for x in (A, B, C, D)),
        _rows(z, dtype),
        *(_dense(x, wide) for x in (delta_bias, initial_state)),
    )
    y, final_state = _run("scan", delta_softplus, lengths, *tensors)
    return y.to(u.dtype), final_state


def scan_projected(
    u, delta, A_log, bc, D, z, delta_bias, initial_state, lengths
) -> tuple[Tensor, Tensor] | None:
    """Without gradients; None for dtypes that would have to be converted."""
    dtype, wide = _dtypes(u, delta, z, bc)
    if wide != torch.float32 or (initial_state is not None and initial_state.dtype != wide):
        return None
    rows = (_rows(x, dtype) for x in (u, delta, bc, z))
    state = _dense(initial_state, wide)
    lengths = _dense(lengths, torch.int64)
    y, state = kernels().scan_projected(*rows, A_log, D, delta_bias, state, lengths)
    return y.to(u.dtype), state


def ssd(x, dt, A, B, C, D, dt_bias, initial_state, lengths) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan; shapes as in vlmamba.models.mixers.mamba2."""
    dtype, wide = _dtypes(x, dt, B, C)
    tensors = (
        _rows(x.flatten(2), dtype),
        _rows(dt, dtype),
        _dense(A, wide),
        *(_rows(t.flatten(2), dtype) for t in (B, C)),
        *(_dense(t, wide) for t in (D, dt_bias, initial_state)),
    )
    y, final_state = _run("ssd", B.shape[2], lengths, *tensors)
    return y.view(x.shape).to(x.dtype), final_state


def _run(name: str, option: Any, lengths: Tensor | None, *tensors) -> tuple[Tensor, Tensor]:
    """The kernel `name` on its tensors, the last of which is the initial state: y, final state."""
    lengths = _dense(lengths, torch.int64)
    if _needs_grad(*tensors):
        return _Recurrence.apply(name, option, lengths, *tensors)
    y, final_state, _ = getattr(kernels(), name)(*tensors, lengths, option, False)
    return y, final_state


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, option, lengths, *tensors):
        run = getattr(kernels(), name)
        y, final_state, checkpoints = run(*tensors, lengths, option, True)
        ctx.save_for_backward(*tensors[:-1], lengths, checkpoints)
        ctx.name, ctx.option = name, option
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        *tensors, lengths, checkpoints = ctx.saved_tensors
        grads = getattr(kernels(), f"{ctx.name}_backward")(
            *tensors, lengths, ctx.option, grad_y.contiguous(), grad_final.contiguous(), checkpoints
        )
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(g if n else None for g, n in zip(grads, needed, strict=True))


def selective_scan_step(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    dtype, wide = _dtypes(u, delta, z)
    h = _dense(state, wide)
    y = kernels().scan_step(
        h,
        _rows(u, dtype),
        _rows(delta, dtype),
        _dense(A, wide),
        _dense(B, wide),
        _dense(C, wide),
        _dense(D, wide),
        _rows(z, dtype),
        _dense(delta_bias, wide),
        delta_softplus,
    )
    if h is not state:
        state.copy_(h)
    return y if y.dtype == u.dtype else y.to(u.dtype)


def causal_conv1d(x, weight, bias, initial_state, lengths, activation) -> tuple[Tensor, Tensor]:
    if weight.shape[1] > MAX_TAPS:
        return torch_ops.causal_conv1d(x, weight, bias, initial_state, lengths, activation)
    dtype, wide = _dtypes(x)
    tensors = (
        _rows(x, dtype),
        _dense(weight, wide),
        _dense(bias, wide),
        _dense(initial_state, dtype),
    )
    run = _Conv.apply if _needs_grad(*tensors) else kernels().conv
    y, final_state = run(*tensors, _dense(lengths, torch.int64), activation == "silu")
    return y.to(x.dtype), final_state.to(x.dtype)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)
        return kernels().conv(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        grads = kernels().conv_backward(
            *ctx.saved_tensors, ctx.silu, grad_y.contiguous(), grad_final.contiguous()
        )
        needed = ctx.needs_input_grad[:4]
        return *(g if n else None for g, n in zip(grads, needed, strict=True)), None, None


def causal_conv1d_step(state, x, weight, bias, activation) -> Tensor:
    if weight.shape[1] > MAX_TAPS:
        return torch_ops.causal_conv1d_step(state, x, weight, bias, activation)
    dtype, wide = _dtypes(x)
    past = _dense(state, dtype)
    y = kernels().conv_step(
        past, _rows(x, dtype), _dense(weight, wide), _dense(bias, wide), activation == "silu"
    )
    if past is not state:
        state.copy_(past)
    return y.to(x.dtype)
