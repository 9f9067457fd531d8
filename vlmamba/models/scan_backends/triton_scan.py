"""Triton kernels of Mamba's selective scan, forward and backward, and of its single step.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t          y_t = (C_t h_t + D u_t) silu(z_t)

The sequence is cut into chunks of `CHUNK` steps that run side by side: each chunk from a zero state
gives what it adds to the state (`_chunk_gains`), a short loop over chunks carries the state
(`_carry`), and each chunk runs again from its true first state (`_chunk_outputs`). The backward
pass is the same three kernels in the other direction; its last one (`_chunk_gradients`) first
recomputes the chunk's states into a scratch buffer. Only products of decays exp(delta A) <= 1
occur.

The cut depends on nothing but the step's index, so a row's bits do not depend on its batch.
Shapes: B batch, L steps, Di channels, N states, S chunks. A program holds the states of `D_BLOCK`
channels, (D_BLOCK, N_BLOCK), in registers; steps behind a row's length are never visited.

Tuning: a program is one warp, so that sums over states stay inside it, and many of them hide each
other's waits. Longer chunks carry fewer states, shorter ones give more programs; 64 steps give
2,560 programs for a batch of 1, 2,048 steps and 1,280 channels of 16 states. The sizes below follow
from the compiler's register counts. On a GPU: not run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # steps a program runs one after the other
STATES_OF_A_WARP = 256  # D_BLOCK * N_BLOCK: eight float32 registers a thread
STAGES = 3  # loads are issued this many steps ahead
SLOTS_OF_A_PROCESSOR = 4  # programs of the backward pass at once, each with its own scratch
Made = TypeVar("Made")


def on_its_device(launch: Callable[..., Made]) -> Callable[..., Made]:
    """Run a function on the GPU of its first tensor: Triton launches on the current one."""

    @functools.wraps(launch)
    def launched(x: Tensor, *others, **options) -> Made:
        if not x.is_cuda:  # the interpreter
            return launch(x, *others, **options)
        with torch.cuda.device(x.device):
            return launch(x, *others, **options)

    return launched


@triton.jit
def row_end(lengths, row, length):
    """Real steps of a row."""
    if lengths is not None:
        length = tl.load(lengths + row)
    return length


@triton.jit
def step_size(delta, delta_bias, mask, SOFTPLUS: tl.constexpr, WIDE: tl.constexpr):
    """delta + delta_bias, then softplus.

    softplus(x) = max(x, 0) + log1p(exp(-|x|)), where log1p(e) = e log(w) / (w - 1) with w = 1 + e:
    what rounding w loses is in both factors, so small steps keep their digits.
    """
    step = tl.load(delta, mask=mask, other=0).to(WIDE) + delta_bias
    if SOFTPLUS:
        e = tl.exp(-tl.abs(step))
        w = 1 + e
        vanishes = w == 1  # e is below the last digit of 1
        log1p = tl.where(vanishes, e, e * tl.log(w) / tl.where(vanishes, 1, w - 1))
        step = tl.maximum(step, 0) + log1p
    return step


@triton.jit
def _vector(pointer, d, mask, D_BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(D_BLOCK,) of a per-channel parameter, zeros if it is None."""
    if pointer is None:
        return tl.zeros((D_BLOCK,), WIDE)
    return tl.load(pointer + d, mask=mask, other=0).to(WIDE)


@triton.jit
def _chunk_gains(
    u,
    delta,
    A,
    B,
    delta_bias,
    lengths,
    gains,
    totals,
    length,
    channels,
    states,
    u_row,
    u_step,
    delta_row,
    delta_step,
    B_row,
    B_step,
    SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """gains (B, S, Di, N): a chunk's last state from zeros; totals (B, S, Di): sum of steps."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N_BLOCK)
    real_d, real_n = d < channels, n < states
    real, tile = real_d[:, None] & real_n[None, :], d[:, None] * states + n[None, :]
    a = tl.load(A + tile, mask=real, other=0).to(WIDE)
    bias = _vector(delta_bias, d, real_d, D_BLOCK, WIDE)
    first = chunk * CHUNK
    steps = tl.minimum(row_end(lengths, row, length) - first, CHUNK).to(tl.int32)
    u += row * u_row + first * u_step + d
    delta += row * delta_row + first * delta_step + d
    B += row * B_row + first * B_step + n
    h, total = tl.zeros((D_BLOCK, N_BLOCK), WIDE), tl.zeros((D_BLOCK,), WIDE)
    for t in tl.range(0, steps, num_stages=STAGES):
        dt = step_size(delta + t * delta_step, bias, real_d, SOFTPLUS, WIDE)
        x = tl.load(u + t * u_step, mask=real_d, other=0).to(WIDE)
        b = tl.load(B + t * B_step, mask=real_n, other=0).to(WIDE)
        h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b[None, :]
        total += dt
    place = row * tl.num_programs(1) + chunk
    tl.store(gains + place * channels * states + tile, h, mask=real)
    tl.store(totals + place * channels + d, total, mask=real_d)


@triton.jit
def _carry(
    gains,
    totals,
    A,
    first,
    last,
    chunks,
    channels,
    states,
    REVERSED: tl.constexpr,
    WIDE: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    """Replace each chunk's gain by the state that reaches it; `last` (B, Di, N) leaves the end."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N_BLOCK)
    real_d = d < channels
    real, tile = real_d[:, None] & (n < states)[None, :], d[:, None] * states + n[None, :]
    a = tl.load(A + tile, mask=real, other=0).to(WIDE)
    size = channels * states
    if first is None:
        h = tl.zeros((D_BLOCK, N_BLOCK), WIDE)
    else:
        h = tl.load(first + row * size + tile, mask=real, other=0).to(WIDE)
    for i in tl.range(0, chunks):
        chunk = chunks - 1 - i if REVERSED else i
        place = row * chunks + chunk
        gain = tl.load(gains + place * size + tile, mask=real, other=0).to(WIDE)
        total = tl.load(totals + place * channels + d, mask=real_d, other=0).to(WIDE)
        tl.store(gains + place * size + tile, h, mask=real)
        h = tl.exp(total[:, None] * a) * h + gain
    tl.store(last + row * size + tile, h, mask=real)


@triton.jit
def _chunk_outputs(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    lengths,
    starts,
    y,
    length,
    channels,
    states,
    u_row,
    u_step,
    delta_row,
    delta_step,
    B_row,
    B_step,
    C_row,
    C_step,
    z_row,
    z_step,
    SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y (B, L, Di), contiguous, from the state before each chunk, starts (B, S, Di, N)."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N_BLOCK)
    real_d, real_n = d < channels, n < states
    real, tile = real_d[:, None] & real_n[None, :], d[:, None] * states + n[None, :]
    a = tl.load(A + tile, mask=real, other=0).to(WIDE)
    bias = _vector(delta_bias, d, real_d, D_BLOCK, WIDE)
    skip = _vector(D, d, real_d, D_BLOCK, WIDE)
    first = chunk * CHUNK
    steps = tl.minimum(row_end(lengths, row, length) - first, CHUNK).to(tl.int32)
    u += row * u_row + first * u_step + d
    delta += row * delta_row + first * delta_step + d
    B += row * B_row + first * B_step + n
    C += row * C_row + first * C_step + n
    if z is not None:
        z += row * z_row + first * z_step + d
    y += (row * length + first) * channels + d
    place = row * tl.num_programs(1) + chunk
    h = tl.load(starts + place * channels * states + tile, mask=real, other=0).to(WIDE)
    for t in tl.range(0, steps, num_stages=STAGES):
        dt = step_size(delta + t * delta_step, bias, real_d, SOFTPLUS, WIDE)
        x = tl.load(u + t * u_step, mask=real_d, other=0).to(WIDE)
        b = tl.load(B + t * B_step, mask=real_n, other=0).to(WIDE)
        c = tl.load(C + t * C_step, mask=real_n, other=0).to(WIDE)
        h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b[None, :]
        out = tl.sum(h * c[None, :], axis=1) + skip * x
        if z is not None:
            gate = tl.load(z + t * z_step, mask=real_d, other=0).to(WIDE)
            out *= gate / (1 + tl.exp(-gate))
        tl.store(y + t * channels, out.to(y.dtype.element_ty), mask=real_d)


@triton.jit
def _chunk_state_gradients(
    delta,
    A,
    C,
    z,
    delta_bias,
    lengths,
    grad_y,
    gains,
    length,
    channels,
    states,
    delta_row,
    delta_step,
    C_row,
    C_step,
    z_row,
    z_step,
    SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """gains (B, S, Di, N): gradient of the state before a chunk through the chunk's outputs."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N_BLOCK)
    real_d, real_n = d < channels, n < states
    real, tile = real_d[:, None] & real_n[None, :], d[:, None] * states + n[None, :]
    a = tl.load(A + tile, mask=real, other=0).to(WIDE)
    bias = _vector(delta_bias, d, real_d, D_BLOCK, WIDE)
    first = chunk * CHUNK
    steps = tl.minimum(row_end(lengths, row, length) - first, CHUNK).to(tl.int32)
    delta += row * delta_row + first * delta_step + d
    C += row * C_row + first * C_step + n
    if z is not None:
        z += row * z_row + first * z_step + d
    grad_y += (row * length + first) * channels + d
    g = tl.zeros((D_BLOCK, N_BLOCK), WIDE)
    for i in tl.range(0, steps, num_stages=STAGES):
        t = steps - 1 - i
        dt = step_size(delta + t * delta_step, bias, real_d, SOFTPLUS, WIDE)
        c = tl.load(C + t * C_step, mask=real_n, other=0).to(WIDE)
        grad = tl.load(grad_y + t * channels, mask=real_d, other=0).to(WIDE)
        if z is not None:
            gate = tl.load(z + t * z_step, mask=real_d, other=0).to(WIDE)
            grad *= gate / (1 + tl.exp(-gate))
        g = tl.exp(dt[:, None] * a) * (g + grad[:, None] * c[None, :])
    place = row * tl.num_programs(1) + chunk
    tl.store(gains + place * channels * states + tile, g, mask=real)


@triton.jit
def _chunk_gradients(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    lengths,
    starts,
    ends,
    grad_y,
    grad_u,
    grad_delta,
    grad_z,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
    scratch,
    items,
    length,
    channels,
    states,
    u_row,
    u_step,
    delta_row,
    delta_step,
    B_row,
    B_step,
    C_row,
    C_step,
    z_row,
    z_step,
    SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All gradients of one chunk and block of channels after the other, `items` in all.

    ends (B, S, Di, N): gradient of the state after a chunk; it is overwritten by the chunk's part
    of A's gradient. grad_B, grad_C: (B, L, blocks, N), grad_D, grad_bias: (B, S, Di): parts too,
    added up afterwards, in one order. scratch: (programs, CHUNK, D_BLOCK, N_BLOCK).
    """
    blocks = tl.cdiv(channels, D_BLOCK)
    chunks = tl.cdiv(length, CHUNK)
    n = tl.arange(0, N_BLOCK)
    lane = tl.arange(0, D_BLOCK)[:, None] * N_BLOCK + n[None, :]
    kept = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * D_BLOCK * N_BLOCK) + lane
    item = tl.program_id(0).to(tl.int64)
    while item < items:
        block, place = item % blocks, item // blocks
        row, first = place // chunks, place % chunks * CHUNK
        d = block * D_BLOCK + tl.arange(0, D_BLOCK)
        real_d, real_n = d < channels, n < states
        real, tile = real_d[:, None] & real_n[None, :], d[:, None] * states + n[None, :]
        a = tl.load(A + tile, mask=real, other=0).to(WIDE)
        bias = _vector(delta_bias, d, real_d, D_BLOCK, WIDE)
        skip = _vector(D, d, real_d, D_BLOCK, WIDE)
        steps = tl.minimum(row_end(lengths, row, length) - first, CHUNK).to(tl.int32)
        u_at = u + row * u_row + first * u_step + d
        delta_at = delta + row * delta_row + first * delta_step + d
        B_at = B + row * B_row + first * B_step + n
        C_at = C + row * C_row + first * C_step + n
        here = (row * length + first) * channels + d
        part = (row * length + first) * blocks * states + block * states + n
        h = tl.load(starts + place * channels * states + tile, mask=real, other=0).to(WIDE)
        for t in tl.range(0, steps, num_stages=STAGES):
            dt = step_size(delta_at + t * delta_step, bias, real_d, SOFTPLUS, WIDE)
            x = tl.load(u_at + t * u_step, mask=real_d, other=0).to(WIDE)
            b = tl.load(B_at + t * B_step, mask=real_n, other=0).to(WIDE)
            tl.store(kept + t * (D_BLOCK * N_BLOCK), h)
            h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b[None, :]
        tl.debug_barrier()  # the loop below reads what other threads may have kept
        g = tl.load(ends + place * channels * states + tile, mask=real, other=0).to(WIDE)
        sum_A = tl.zeros((D_BLOCK, N_BLOCK), WIDE)
        sum_D, sum_bias = tl.zeros((D_BLOCK,), WIDE), tl.zeros((D_BLOCK,), WIDE)
        for i in tl.range(0, steps):
            t = steps - 1 - i
            dt = step_size(delta_at + t * delta_step, bias, real_d, SOFTPLUS, WIDE)
            x = tl.load(u_at + t * u_step, mask=real_d, other=0).to(WIDE)
            b = tl.load(B_at + t * B_step, mask=real_n, other=0).to(WIDE)
            c = tl.load(C_at + t * C_step, mask=real_n, other=0).to(WIDE)
            before = tl.load(kept + t * (D_BLOCK * N_BLOCK))
            grad = tl.load(grad_y + here + t * channels, mask=real_d, other=0).to(WIDE)
            decay = tl.exp(dt[:, None] * a)
            h = decay * before + (dt * x)[:, None] * b[None, :]
            if z is not None:
                gate = tl.load(z + row * z_row + (first + t) * z_step + d, mask=real_d, other=0).to(
                    WIDE
                )
                s = 1 / (1 + tl.exp(-gate))
                ungated = tl.sum(h * c[None, :], axis=1) + skip * x
                of_gate = grad * ungated * s * (1 + gate * (1 - s))
                at = grad_z + here + t * channels
                tl.store(at, of_gate.to(grad_z.dtype.element_ty), mask=real_d)
                grad *= gate * s
            g += grad[:, None] * c[None, :]  # now the gradient of h_t
            of_C = tl.sum(h * grad[:, None], axis=0)
            of_B = tl.sum(g * (dt * x)[:, None], axis=0)
            through_b = tl.sum(g * b[None, :], axis=1)
            g *= decay  # now that of h_{t-1}
            of_step = tl.sum(g * before * a, axis=1) + through_b * x
            sum_A += g * before * dt[:, None]
            sum_D += grad * x
            if SOFTPLUS:
                raw = tl.load(delta_at + t * delta_step, mask=real_d, other=0).to(WIDE) + bias
                of_step /= 1 + tl.exp(-raw)
            sum_bias += of_step
            of_u = through_b * dt + skip * grad
            at = here + t * channels
            tl.store(grad_u + at, of_u.to(grad_u.dtype.element_ty), mask=real_d)
            tl.store(grad_delta + at, of_step.to(grad_delta.dtype.element_ty), mask=real_d)
            tl.store(grad_B + part + t * blocks * states, of_B, mask=real_n)
            tl.store(grad_C + part + t * blocks * states, of_C, mask=real_n)
        tl.store(ends + place * channels * states + tile, sum_A, mask=real)
        tl.store(grad_D + place * channels + d, sum_D, mask=real_d)
        tl.store(grad_bias + place * channels + d, sum_bias, mask=real_d)
        tl.debug_barrier()  # before the next item overwrites the scratch
        item += tl.num_programs(0)


@triton.jit
def _step(
    state,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    y,
    channels,
    states,
    u_row,
    delta_row,
    B_row,
    C_row,
    z_row,
    SOFTPLUS: tl.constexpr,
    WIDE: tl.constexpr,
    D_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    """One token: state (B, Di, N) in place, y (B, Di)."""
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    n = tl.arange(0, N_BLOCK)
    real_d, real_n = d < channels, n < states
    real, tile = real_d[:, None] & real_n[None, :], d[:, None] * states + n[None, :]
    a = tl.load(A + tile, mask=real, other=0).to(WIDE)
    bias = _vector(delta_bias, d, real_d, D_BLOCK, WIDE)
    skip = _vector(D, d, real_d, D_BLOCK, WIDE)
    dt = step_size(delta + row * delta_row + d, bias, real_d, SOFTPLUS, WIDE)
    x = tl.load(u + row * u_row + d, mask=real_d, other=0).to(WIDE)
    b = tl.load(B + row * B_row + n, mask=real_n, other=0).to(WIDE)
    c = tl.load(C + row * C_row + n, mask=real_n, other=0).to(WIDE)
    at = state + row * channels * states + tile
    h = (
        tl.exp(dt[:, None] * a) * tl.load(at, mask=real, other=0).to(WIDE)
        + (dt * x)[:, None] * b[None, :]
    )
    tl.store(at, h.to(state.dtype.element_ty), mask=real)
    out = tl.sum(h * c[None, :], axis=1) + skip * x
    if z is not None:
        gate = tl.load(z + row * z_row + d, mask=real_d, other=0).to(WIDE)
        out *= gate / (1 + tl.exp(-gate))
    tl.store(y + row * channels + d, out.to(y.dtype.element_ty), mask=real_d)


def wide(x: Tensor) -> tl.dtype:
    """The dtype of sums, as `reference.wide_dtype` has it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dense_rows(x: Tensor | None) -> Tensor | None:
    """x with its last dimension contiguous; a slice of a wider projection stays as it is."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_steps(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of batch and time of each (B, L, ...) tensor, one after the other."""
    return tuple(s for x in tensors for s in ((0, 0) if x is None else x.stride()[:2]))


def tile_sizes(channels: int, states: int) -> tuple[int, int]:
    """(D_BLOCK, N_BLOCK), powers of two: one warp holds STATES_OF_A_WARP states."""
    n_block = triton.next_power_of_2(states)
    d_block = max(1, STATES_OF_A_WARP // n_block)
    return min(d_block, triton.next_power_of_2(channels)), n_block


def _options(u: Tensor, A: Tensor, softplus: bool, **more) -> dict:
    d_block, n_block = tile_sizes(*A.shape)
    sizes = {"D_BLOCK": d_block, "N_BLOCK": n_block}
    return {"SOFTPLUS": softplus, "WIDE": wide(u), **sizes, "num_warps": 1, **more}


@on_its_device
def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, lengths, softplus
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, the state before each chunk (B, S, Di, N), steps' sums (B, S, Di)."""
    (batch, length, channels), states = u.shape, A.shape[1]
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    options = _options(u, A, softplus, CHUNK=CHUNK, STAGES=STAGES)
    blocks, chunks = triton.cdiv(channels, options["D_BLOCK"]), triton.cdiv(length, CHUNK)
    starts = u.new_empty(batch, chunks, channels, states, dtype=dtype)
    totals = u.new_empty(batch, chunks, channels, dtype=dtype)
    last = u.new_empty(batch, channels, states, dtype=dtype)
    y = (torch.empty if lengths is None else torch.zeros)(u.shape, dtype=u.dtype, device=u.device)
    sizes, grid = (length, channels, states), (blocks, chunks, batch)
    _chunk_gains[grid](
        u, delta, A, B, delta_bias, lengths, starts, totals, *sizes,
        *row_steps(u, delta, B), **options,
    )  # fmt: skip
    _run_carry(starts, totals, A, initial_state, last, options, backwards=False)
    _chunk_outputs[grid](
        u, delta, A, B, C, D, z, delta_bias, lengths, starts, y, *sizes,
        *row_steps(u, delta, B, C, z), **options,
    )  # fmt: skip
    return y, last, starts, totals


def _run_carry(gains, totals, A, first, last, options: dict, backwards: bool) -> None:
    batch, chunks, channels, states = gains.shape
    kept = {k: options[k] for k in ("WIDE", "D_BLOCK", "N_BLOCK", "num_warps")}
    grid = (triton.cdiv(channels, kept["D_BLOCK"]), batch)
    _carry[grid](
        gains, totals, A, first, last, chunks, channels, states, REVERSED=backwards, **kept
    )


def _slots(device: torch.device) -> int:
    """How many programs of the last backward kernel run at once."""
    if device.type != "cuda":
        return SLOTS_OF_A_PROCESSOR  # the interpreter
    return SLOTS_OF_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class Scan(torch.autograd.Function):
    """y and the last state of (lengths, softplus, u, delta, A, B, C, D, z, delta_bias, state)."""

    @staticmethod
    def forward(ctx, lengths, softplus, *tensors):
        y, last, starts, totals = scan_forward(*tensors, lengths, softplus)
        ctx.save_for_backward(*tensors, lengths, starts, totals)
        ctx.softplus = softplus
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        grads = _scan_backward(
            *ctx.saved_tensors, ctx.softplus, grad_y.contiguous(), grad_last.contiguous()
        )
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if n else None for g, n in zip(grads, needed, strict=True))


@on_its_device
def _scan_backward(
    u, delta, A, B, C, D, z, delta_bias, first, lengths, starts, totals, softplus, grad_y, grad_last
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state."""
    (batch, length, channels), states, dtype = u.shape, A.shape[1], starts.dtype
    options = _options(u, A, softplus, CHUNK=CHUNK, STAGES=STAGES)
    blocks, chunks = triton.cdiv(channels, options["D_BLOCK"]), starts.shape[1]
    sizes = (length, channels, states)
    ends, grad_first = torch.empty_like(starts), torch.empty_like(starts[:, 0])
    _chunk_state_gradients[(blocks, chunks, batch)](
        delta, A, C, z, delta_bias, lengths, grad_y, ends, *sizes,
        *row_steps(delta, C, z), **options,
    )  # fmt: skip
    _run_carry(ends, totals, A, grad_last, grad_first, options, backwards=True)

    new = u.new_empty if lengths is None else u.new_zeros  # padding has gradient 0
    grad_u, grad_delta = (new(x.shape, dtype=x.dtype) for x in (u, delta))
    grad_z = None if z is None else new(z.shape, dtype=z.dtype)
    grad_B, grad_C = (new((batch, length, blocks, states), dtype=dtype) for _ in "BC")
    grad_D, grad_bias = (torch.empty_like(totals) for _ in range(2))
    items = batch * chunks * blocks
    slots = min(items, _slots(u.device))
    scratch = u.new_empty(slots, CHUNK, options["D_BLOCK"], options["N_BLOCK"], dtype=dtype)
    _chunk_gradients[(slots,)](
        u, delta, A, B, C, D, z, delta_bias, lengths, starts, ends, grad_y,
        grad_u, grad_delta, grad_z, grad_B, grad_C, grad_D, grad_bias, scratch, items, *sizes,
        *row_steps(u, delta, B, C, z), **options,
    )  # fmt: skip
    return (
        grad_u,
        grad_delta,
        ends.sum((0, 1)).to(A.dtype),
        grad_B.sum(2).to(B.dtype),
        grad_C.sum(2).to(C.dtype),
        None if D is None else grad_D.sum((0, 1)).to(D.dtype),
        grad_z,
        None if delta_bias is None else grad_bias.sum((0, 1)).to(delta_bias.dtype),
        None if first is None else grad_first.to(first.dtype),
    )


@on_its_device
def scan_step(state, u, delta, A, B, C, D, z, delta_bias, softplus) -> Tensor:
    """y (B, Di); `state`, contiguous, is updated in place."""
    batch, channels, states = state.shape
    options = _options(state, A, softplus)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    rows = (0 if x is None else x.stride(0) for x in (u, delta, B, C, z))
    _step[(triton.cdiv(channels, options["D_BLOCK"]), batch)](
        state, u, delta, A, B, C, D, z, delta_bias, y, channels, states, *rows, **options
    )
    return y
