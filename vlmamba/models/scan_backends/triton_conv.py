"""Triton kernels of the short causal convolution, forward and backward, and of its single step.

    y_t = silu(bias + sum_k weight[:, k] x_{t-K+1+k})       x_{-K+1..-1} is the initial state

Every output is independent, so programs tile time and channels; a tap is one load of the tile,
shifted. The backward pass first writes the gradient of the sum before silu, then correlates it with
the taps. Shapes: B batch, L steps, Di channels, K taps; a state is (B, K-1, Di).

Tuning: channels are contiguous, so a tile is 128 of them wide and 32 steps high, whose K-1 steps
before it are read twice. On a GPU: not run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.models.scan_backends.triton_scan import (
    dense_rows,
    on_its_device,
    row_end,
    row_steps,
    wide,
)

T_BLOCK, D_BLOCK = 32, 128  # of a program with 4 warps: 32 float32 registers a thread
STEP_BLOCK = 256  # channels of a program of the single step


@triton.jit
def _inputs_at(
    x, state, t, d, end, real_d, x_step, channels, TAPS: tl.constexpr, WIDE: tl.constexpr
):
    """x at steps t (T,) and channels d (D,), the state before step 0, 0 from `end` on."""
    now = ((t >= 0) & (t < end))[:, None] & real_d[None, :]
    value = tl.load(x + t[:, None] * x_step + d[None, :], mask=now, other=0).to(WIDE)
    if state is not None:
        past = ((t < 0) & (t >= 1 - TAPS))[:, None] & real_d[None, :]
        value += tl.load(
            state + (t[:, None] + TAPS - 1) * channels + d[None, :], mask=past, other=0
        ).to(WIDE)
    return value


@triton.jit
def _presum(
    x,
    state,
    weight,
    bias,
    t,
    d,
    end,
    real_d,
    x_step,
    channels,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What silu is applied to, (T, D)."""
    total = tl.zeros((t.shape[0], d.shape[0]), WIDE)
    if bias is not None:
        total += tl.load(bias + d, mask=real_d, other=0).to(WIDE)[None, :]
    for k in tl.static_range(TAPS):
        tap = tl.load(weight + d * TAPS + k, mask=real_d, other=0).to(WIDE)
        shifted = t - (TAPS - 1) + k
        total += tap[None, :] * _inputs_at(
            x, state, shifted, d, end, real_d, x_step, channels, TAPS, WIDE
        )
    return total


@triton.jit
def _conv(
    x,
    weight,
    bias,
    state,
    lengths,
    y,
    last,
    length,
    channels,
    x_row,
    x_step,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    T_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """y (B, L, Di) and, by the programs of the first steps, the last inputs (B, K-1, Di)."""
    row = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    t = tl.program_id(1).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)
    real_d = d < channels
    end = row_end(lengths, row, length)
    x += row * x_row
    if state is not None:
        state += row * (TAPS - 1) * channels
    total = _presum(x, state, weight, bias, t, d, end, real_d, x_step, channels, TAPS, WIDE)
    if SILU:
        total /= 1 + tl.exp(-total)
    total = tl.where((t < end)[:, None], total, 0)
    at = y + (row * length + t[:, None]) * channels + d[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & real_d[None, :])
    if tl.program_id(1) == 0:
        for k in tl.static_range(TAPS - 1):
            place = (tl.arange(0, 1) + end - (TAPS - 1) + k).to(tl.int64)
            value = _inputs_at(x, state, place, d, end, real_d, x_step, channels, TAPS, WIDE)
            place_in_last = last + (row * (TAPS - 1) + k) * channels + d[None, :]
            tl.store(place_in_last, value.to(last.dtype.element_ty), mask=real_d[None, :])


@triton.jit
def _conv_presum_gradient(
    x,
    weight,
    bias,
    state,
    lengths,
    grad_y,
    grad_sum,
    grad_weight,
    grad_bias,
    length,
    channels,
    x_row,
    x_step,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    T_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """grad_sum (B, L, Di), and this tile's part of grad_weight and grad_bias (B, tiles, ...)."""
    row = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    t = tl.program_id(1).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)
    real_d = d < channels
    end = row_end(lengths, row, length)
    x += row * x_row
    if state is not None:
        state += row * (TAPS - 1) * channels
    at = (row * length + t[:, None]) * channels + d[None, :]
    grad = tl.load(grad_y + at, mask=(t < end)[:, None] & real_d[None, :], other=0).to(WIDE)
    if SILU:
        total = _presum(x, state, weight, bias, t, d, end, real_d, x_step, channels, TAPS, WIDE)
        s = 1 / (1 + tl.exp(-total))
        grad *= s * (1 + total * (1 - s))
    tl.store(grad_sum + at, grad, mask=(t < length)[:, None] & real_d[None, :])
    tile = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(grad_bias + tile * channels + d, tl.sum(grad, axis=0), mask=real_d)
    for k in tl.static_range(TAPS):
        shifted = t - (TAPS - 1) + k
        value = _inputs_at(x, state, shifted, d, end, real_d, x_step, channels, TAPS, WIDE)
        part = tl.sum(grad * value, axis=0)
        tl.store(grad_weight + (tile * channels + d) * TAPS + k, part, mask=real_d)


@triton.jit
def _conv_input_gradient(
    weight,
    lengths,
    grad_sum,
    grad_last,
    grad_x,
    grad_state,
    length,
    channels,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    T_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """Gradients of the inputs and, at steps -K+1..-1, of the initial state."""
    row = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    t = tl.program_id(1).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK) - (TAPS - 1)
    real_d = d < channels
    end = row_end(lengths, row, length)
    total = tl.zeros((T_BLOCK, D_BLOCK), WIDE)
    for k in tl.static_range(TAPS):
        later = t + (TAPS - 1) - k
        mask = ((later >= 0) & (later < end))[:, None] & real_d[None, :]
        at = grad_sum + (row * length + later[:, None]) * channels + d[None, :]
        tap = tl.load(weight + d * TAPS + k, mask=real_d, other=0).to(WIDE)
        total += tap[None, :] * tl.load(at, mask=mask, other=0).to(WIDE)
    kept = t - end + TAPS - 1  # where this input stands in the last state
    mask = ((kept >= 0) & (kept < TAPS - 1))[:, None] & real_d[None, :]
    at = grad_last + (row * (TAPS - 1) + kept[:, None]) * channels + d[None, :]
    total += tl.load(at, mask=mask, other=0).to(WIDE)
    now = ((t >= 0) & (t < length))[:, None] & real_d[None, :]
    at = grad_x + (row * length + t[:, None]) * channels + d[None, :]
    tl.store(at, total.to(grad_x.dtype.element_ty), mask=now)
    past = (t < 0)[:, None] & real_d[None, :]
    at = grad_state + (row * (TAPS - 1) + t[:, None] + TAPS - 1) * channels + d[None, :]
    tl.store(at, total.to(grad_state.dtype.element_ty), mask=past)


@triton.jit
def _conv_step(
    state,
    x,
    weight,
    bias,
    y,
    channels,
    x_row,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    D_BLOCK: tl.constexpr,
):
    """One token: the state (B, K-1, Di) moves by one input in place, y (B, Di)."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    real_d = d < channels
    state += row * (TAPS - 1) * channels + d
    total = tl.zeros((D_BLOCK,), WIDE)
    if bias is not None:
        total += tl.load(bias + d, mask=real_d, other=0).to(WIDE)
    new = tl.load(x + row * x_row + d, mask=real_d, other=0)
    for k in tl.static_range(TAPS - 1):
        value = tl.load(state + k * channels, mask=real_d, other=0)
        total += tl.load(weight + d * TAPS + k, mask=real_d, other=0).to(WIDE) * value.to(WIDE)
        if k > 0:
            tl.store(state + (k - 1) * channels, value, mask=real_d)
    if TAPS > 1:
        tl.store(state + (TAPS - 2) * channels, new.to(state.dtype.element_ty), mask=real_d)
    total += tl.load(weight + d * TAPS + TAPS - 1, mask=real_d, other=0).to(WIDE) * new.to(WIDE)
    if SILU:
        total /= 1 + tl.exp(-total)
    tl.store(y + row * channels + d, total.to(y.dtype.element_ty), mask=real_d)


def _grid(x: Tensor, extra: int = 0) -> tuple[int, int, int]:
    batch, length, channels = x.shape
    return triton.cdiv(channels, D_BLOCK), triton.cdiv(length + extra, T_BLOCK), batch


def _options(x: Tensor, weight: Tensor, silu: bool) -> dict:
    tile = {"T_BLOCK": T_BLOCK, "D_BLOCK": D_BLOCK}
    return {"TAPS": weight.shape[1], "SILU": silu, "WIDE": wide(x), **tile}


@on_its_device
def conv_forward(x, weight, bias, state, lengths, silu: bool) -> tuple[Tensor, Tensor]:
    """y (B, L, Di) and the last inputs (B, K-1, Di), both in x's dtype."""
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    last = x.new_empty(batch, weight.shape[1] - 1, channels)
    _conv[_grid(x)](
        x, weight, bias, state, lengths, y, last, length, channels,
        *row_steps(x), **_options(x, weight, silu),
    )  # fmt: skip
    return y, last


class Conv(torch.autograd.Function):
    """y and the last inputs of (lengths, silu, x, weight, bias, state)."""

    @staticmethod
    def forward(ctx, lengths, silu, *tensors):
        ctx.save_for_backward(*tensors, lengths)
        ctx.silu = silu
        return conv_forward(*tensors, lengths, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        grads = _conv_backward(
            *ctx.saved_tensors, ctx.silu, grad_y.contiguous(), grad_last.contiguous()
        )
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if n else None for g, n in zip(grads, needed, strict=True))


@on_its_device
def _conv_backward(
    x, weight, bias, state, lengths, silu, grad_y, grad_last
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and the initial state."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    options, grid = _options(x, weight, silu), _grid(x)
    grad_sum = x.new_empty(x.shape, dtype=dtype)
    grad_weight = x.new_empty(batch, grid[1], channels, taps, dtype=dtype)
    grad_bias = x.new_empty(batch, grid[1], channels, dtype=dtype)
    _conv_presum_gradient[grid](
        x, weight, bias, state, lengths, grad_y, grad_sum, grad_weight, grad_bias,
        length, channels, *row_steps(x), **options,
    )  # fmt: skip
    grad_x = x.new_empty(x.shape)
    grad_state = torch.empty_like(grad_last)
    del options["SILU"]
    _conv_input_gradient[_grid(x, taps - 1)](
        weight, lengths, grad_sum, grad_last, grad_x, grad_state, length, channels, **options
    )
    return (
        grad_x,
        grad_weight.sum((0, 1)).to(weight.dtype),
        None if bias is None else grad_bias.sum((0, 1)).to(bias.dtype),
        None if state is None else grad_state.to(state.dtype),
    )


@on_its_device
def conv_step(state, x, weight, bias, silu: bool) -> Tensor:
    """y (B, Di); `state`, contiguous, moves by one input in place."""
    batch, channels = x.shape
    x, y = dense_rows(x), x.new_empty(x.shape)
    _conv_step[(triton.cdiv(channels, STEP_BLOCK), batch)](
        state, x, weight, bias, y, channels, x.stride(0),
        TAPS=weight.shape[1], SILU=silu, WIDE=wide(x), D_BLOCK=STEP_BLOCK,
    )  # fmt: skip
    return y
