"""Triton kernels of Mamba-2's scan (SSD), forward and backward, and of its single step.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T              y_t = h_t C_t + D x_t

One head's decay is a number, so a chunk of `CHUNK` steps is a masked product like attention's (Dao
and Gu, arXiv:2405.21060, section 6). With a_t = dt_t A and v_t = dt_t x_t, inside a chunk

    y_q  = sum_{s<=q} (C_q . B_s) exp(a_{s+1} + .. + a_q) v_s + exp(a_1 + .. + a_q) C_q h + D x_q
    h'   = exp(a_1 + .. + a_Q) h + sum_s exp(a_{s+1} + .. + a_Q) v_s B_s^T

for the states h before and h' after it. Kernels are those of `triton_scan`: gains of all chunks, a
loop that carries the state from chunk to chunk, outputs of all chunks; the same again backwards.
Sums of decays are taken for each pair anew, as a difference of running sums loses the small ones.

Shapes: B batch, L steps, S chunks, H heads of P channels, G groups of heads that share B and C, N
states. A program holds one chunk of one head: tiles of (CHUNK, P), (CHUNK, N), (CHUNK, CHUNK) and
(P, N).

Not called yet: compiled for the published sizes (P 64, N 128) the kernels spill registers, so
`mixers.mamba2` stays on PyTorch's products. On a GPU: not run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmamba.models.scan_backends.triton_scan import row_end, row_steps, step_size, wide

CHUNK = 64  # at least 16, the smallest matrix product
CARRY_BLOCK = 1024  # elements of a state that a program of the loop over chunks holds


@triton.jit
def _decays(log_decay, CHUNK: tl.constexpr):
    """exp of the sums over s < r <= q, (q, s), 0 above the diagonal; over r > s, (s,)."""
    r, s = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    later = tl.where(r > s, log_decay[:, None], 0)
    between = tl.where(r >= s, tl.exp(tl.cumsum(later, axis=0)), 0)
    return between, tl.exp(tl.sum(later, axis=0))


@triton.jit
def _steps(
    dt,
    dt_bias,
    lengths,
    row,
    chunk,
    head,
    length,
    dt_row,
    dt_step,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Step sizes (CHUNK,), 0 at padding, and which steps are real."""
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    real = t < row_end(lengths, row, length)
    bias = tl.load(dt_bias + head).to(WIDE)
    steps = step_size(dt + row * dt_row + t * dt_step + head, bias, real, True, WIDE)
    return tl.where(real, steps, 0), real


@triton.jit
def _ssd_gains(
    x,
    dt,
    A,
    B,
    dt_bias,
    lengths,
    gains,
    totals,
    length,
    width,
    states,
    heads_of_a_group,
    x_row,
    x_step,
    dt_row,
    dt_step,
    B_row,
    B_step,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gains (B, S, H, P, N): a chunk's last state from a zero one; totals (B, S, H): sum of a_t."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    t = (chunk * CHUNK + tl.arange(0, CHUNK))[:, None]
    steps, real = _steps(
        dt, dt_bias, lengths, row, chunk, head, length, dt_row, dt_step, WIDE, CHUNK
    )
    log_decay = steps * tl.load(A + head).to(WIDE)
    _, to_end = _decays(log_decay, CHUNK)
    at = x + row * x_row + t * x_step + head * width + p[None, :]
    mask = real[:, None] & (p < width)[None, :]
    values = tl.load(at, mask=mask, other=0).to(WIDE) * (steps * to_end)[:, None]
    at = B + row * B_row + t * B_step + head // heads_of_a_group * states + n[None, :]
    b = tl.load(at, mask=real[:, None] & (n < states)[None, :], other=0).to(WIDE)
    gain = tl.dot(tl.trans(values), b, input_precision=PRECISION)
    place = (row * tl.num_programs(1) + chunk) * heads + head
    at = gains + (place * width + p[:, None]) * states + n[None, :]
    tl.store(at, gain, mask=(p < width)[:, None] & (n < states)[None, :])
    tl.store(totals + place, tl.sum(log_decay, axis=0))


@triton.jit
def _ssd_carry(
    gains,
    totals,
    first,
    last,
    chunks,
    size,
    REVERSED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace each chunk's gain by the state before it; `last` (B, H, P, N) leaves the end."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < size
    here = (row * heads + head) * size + i
    if first is None:
        h = tl.zeros((BLOCK,), WIDE)
    else:
        h = tl.load(first + here, mask=real, other=0).to(WIDE)
    for step in tl.range(0, chunks):
        chunk = chunks - 1 - step if REVERSED else step
        place = (row * chunks + chunk) * heads + head
        gain = tl.load(gains + place * size + i, mask=real, other=0)
        decay = tl.exp(tl.load(totals + place))
        tl.store(gains + place * size + i, h, mask=real)
        h = decay * h + gain
    tl.store(last + here, h, mask=real)


@triton.jit
def _ssd_outputs(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    lengths,
    starts,
    y,
    length,
    width,
    states,
    heads_of_a_group,
    x_row,
    x_step,
    dt_row,
    dt_step,
    B_row,
    B_step,
    C_row,
    C_step,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (B, L, H, P), contiguous, from the state before each chunk, starts (B, S, H, P, N)."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    real_p, real_n = (p < width)[None, :], (n < states)[None, :]
    t = (chunk * CHUNK + tl.arange(0, CHUNK))[:, None]
    steps, real = _steps(
        dt, dt_bias, lengths, row, chunk, head, length, dt_row, dt_step, WIDE, CHUNK
    )
    log_decay = steps * tl.load(A + head).to(WIDE)
    between, _ = _decays(log_decay, CHUNK)
    group = head // heads_of_a_group * states + n[None, :]
    in_state = real[:, None] & real_n
    b = tl.load(B + row * B_row + t * B_step + group, mask=in_state, other=0).to(WIDE)
    c = tl.load(C + row * C_row + t * C_step + group, mask=in_state, other=0).to(WIDE)
    weights = tl.dot(c, tl.trans(b), input_precision=PRECISION) * between
    at = x + row * x_row + t * x_step + head * width + p[None, :]
    inputs = tl.load(at, mask=real[:, None] & real_p, other=0).to(WIDE)
    out = tl.dot(weights, inputs * steps[:, None], input_precision=PRECISION)
    place = (row * tl.num_programs(1) + chunk) * heads + head
    at = starts + (place * width + p[:, None]) * states + n[None, :]
    h = tl.load(at, mask=(p < width)[:, None] & real_n, other=0)
    since_start = tl.exp(tl.cumsum(log_decay, axis=0))
    out += tl.dot(c, tl.trans(h), input_precision=PRECISION) * since_start[:, None]
    out += tl.load(D + head).to(WIDE) * inputs
    out = tl.where(real[:, None], out, 0)
    at = y + ((row * length + t) * heads + head) * width + p[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=(t < length) & real_p)


@triton.jit
def _ssd_state_gradients(
    dt,
    A,
    C,
    dt_bias,
    lengths,
    grad_y,
    gains,
    length,
    width,
    states,
    heads_of_a_group,
    dt_row,
    dt_step,
    C_row,
    C_step,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gains (B, S, H, P, N): gradient of the state before a chunk through the chunk's outputs."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    real_p, real_n = (p < width)[None, :], (n < states)[None, :]
    t = (chunk * CHUNK + tl.arange(0, CHUNK))[:, None]
    steps, real = _steps(
        dt, dt_bias, lengths, row, chunk, head, length, dt_row, dt_step, WIDE, CHUNK
    )
    since_start = tl.exp(tl.cumsum(steps * tl.load(A + head).to(WIDE), axis=0))
    at = grad_y + ((row * length + t) * heads + head) * width + p[None, :]
    grad = tl.load(at, mask=real[:, None] & real_p, other=0).to(WIDE) * since_start[:, None]
    at = C + row * C_row + t * C_step + head // heads_of_a_group * states + n[None, :]
    c = tl.load(at, mask=real[:, None] & real_n, other=0).to(WIDE)
    gain = tl.dot(tl.trans(grad), c, input_precision=PRECISION)
    place = (row * tl.num_programs(1) + chunk) * heads + head
    at = gains + (place * width + p[:, None]) * states + n[None, :]
    tl.store(at, gain, mask=(p < width)[:, None] & real_n)


@triton.jit
def _ssd_gradients(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    lengths,
    starts,
    ends,
    grad_y,
    grad_x,
    grad_dt,
    grad_B,
    grad_C,
    parts,
    length,
    width,
    states,
    heads_of_a_group,
    x_row,
    x_step,
    dt_row,
    dt_step,
    B_row,
    B_step,
    C_row,
    C_step,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one chunk of one head.

    ends (B, S, H, P, N): gradient of the state after a chunk. grad_B, grad_C (B, L, H, N) and parts
    (3, B, S, H), of A, D and dt_bias, are added up afterwards, in one order.
    """
    head, heads = tl.program_id(0), tl.num_programs(0)
    chunk, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    real_p, real_n = (p < width)[None, :], (n < states)[None, :]
    t = (chunk * CHUNK + tl.arange(0, CHUNK))[:, None]
    steps, real = _steps(
        dt, dt_bias, lengths, row, chunk, head, length, dt_row, dt_step, WIDE, CHUNK
    )
    rate = tl.load(A + head).to(WIDE)
    log_decay = steps * rate
    between, to_end = _decays(log_decay, CHUNK)
    since_start = tl.exp(tl.cumsum(log_decay, axis=0))

    group = head // heads_of_a_group * states + n[None, :]
    in_state, in_head = real[:, None] & real_n, real[:, None] & real_p
    b = tl.load(B + row * B_row + t * B_step + group, mask=in_state, other=0).to(WIDE)
    c = tl.load(C + row * C_row + t * C_step + group, mask=in_state, other=0).to(WIDE)
    at = x + row * x_row + t * x_step + head * width + p[None, :]
    inputs = tl.load(at, mask=in_head, other=0).to(WIDE)
    here = ((row * length + t) * heads + head) * width + p[None, :]
    grad = tl.load(grad_y + here, mask=in_head, other=0).to(WIDE)
    place = (row * tl.num_programs(1) + chunk) * heads + head
    at = (place * width + p[:, None]) * states + n[None, :]
    in_tile = (p < width)[:, None] & real_n
    h = tl.load(starts + at, mask=in_tile, other=0)
    g = tl.load(ends + at, mask=in_tile, other=0)

    # inside the chunk: (q, s)
    values = inputs * steps[:, None]
    weights = tl.dot(c, tl.trans(b), input_precision=PRECISION) * between
    of_values = tl.dot(tl.trans(weights), grad, input_precision=PRECISION)
    of_weights = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
    of_scores = of_weights * between
    of_C = tl.dot(of_scores, b, input_precision=PRECISION)
    of_B = tl.dot(tl.trans(of_scores), c, input_precision=PRECISION)
    # a_r is in the sum from s to q where s < r <= q
    q, s = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    over_q = tl.cumsum(of_weights * weights, axis=0, reverse=True)
    of_decay = tl.sum(tl.where(s < q, over_q, 0), axis=1)

    # through the state before the chunk, where a_r is in the sums to q >= r
    read = tl.dot(c, tl.trans(h), input_precision=PRECISION)
    of_C += tl.dot(grad, h, input_precision=PRECISION) * since_start[:, None]
    of_decay += tl.cumsum(tl.sum(grad * read, axis=1) * since_start, axis=0, reverse=True)
    # through the state after the chunk, where a_r is in the sums from s < r and in the whole one
    written = tl.dot(b, tl.trans(g), input_precision=PRECISION) * to_end[:, None]
    of_values += written
    of_B += tl.dot(values, g, input_precision=PRECISION) * to_end[:, None]
    of_tail = tl.sum(values * written, axis=1)
    of_decay += tl.sum(tl.where(q > s, of_tail[None, :], 0), axis=1)
    of_decay += tl.exp(tl.sum(log_decay, axis=0)) * tl.sum(tl.sum(g * h, axis=1), axis=0)

    of_decay = tl.where(real, of_decay, 0)
    of_steps = of_decay * rate + tl.sum(of_values * inputs, axis=1)
    raw = tl.load(dt + row * dt_row + t * dt_step + head, mask=t < length, other=0).to(WIDE)
    raw = tl.sum(raw, axis=1) + tl.load(dt_bias + head).to(WIDE)  # (CHUNK, 1) as (CHUNK,)
    of_steps = tl.where(real, of_steps / (1 + tl.exp(-raw)), 0)
    of_x = of_values * steps[:, None] + tl.load(D + head).to(WIDE) * grad

    tl.store(grad_x + here, of_x.to(grad_x.dtype.element_ty), mask=(t < length) & real_p)
    at = grad_dt + (row * length + t) * heads + head
    tl.store(at, of_steps[:, None].to(grad_dt.dtype.element_ty), mask=t < length)
    at = ((row * length + t) * heads + head) * states + n[None, :]
    tl.store(grad_B + at, of_B, mask=(t < length) & real_n)
    tl.store(grad_C + at, of_C, mask=(t < length) & real_n)
    size = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * heads
    tl.store(parts + place, tl.sum(of_decay * steps, axis=0))
    tl.store(parts + size + place, tl.sum(tl.sum(grad * inputs, axis=1), axis=0))
    tl.store(parts + 2 * size + place, tl.sum(of_steps, axis=0))


@triton.jit
def _ssd_step(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    y,
    width,
    states,
    heads_of_a_group,
    x_row,
    dt_row,
    B_row,
    C_row,
    WIDE: tl.constexpr,
    P_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    """One token of one head: state (B, H, P, N) in place, y (B, H, P)."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    p, n = tl.arange(0, P_BLOCK), tl.arange(0, N_BLOCK)
    real_p, real_n = p < width, n < states
    bias = tl.load(dt_bias + head).to(WIDE)
    step = step_size(dt + row * dt_row + head, bias, True, True, WIDE)
    inputs = tl.load(x + row * x_row + head * width + p, mask=real_p, other=0).to(WIDE)
    group = head // heads_of_a_group * states + n
    b = tl.load(B + row * B_row + group, mask=real_n, other=0).to(WIDE)
    c = tl.load(C + row * C_row + group, mask=real_n, other=0).to(WIDE)
    at = state + ((row * heads + head) * width + p[:, None]) * states + n[None, :]
    mask = real_p[:, None] & real_n[None, :]
    h = tl.exp(step * tl.load(A + head).to(WIDE)) * tl.load(at, mask=mask, other=0).to(WIDE)
    h += (inputs * step)[:, None] * b[None, :]
    tl.store(at, h.to(state.dtype.element_ty), mask=mask)
    out = tl.sum(h * c[None, :], axis=1) + tl.load(D + head).to(WIDE) * inputs
    tl.store(y + (row * heads + head) * width + p, out.to(y.dtype.element_ty), mask=real_p)


def _dense_tail(x: Tensor) -> Tensor:
    """x with its last two dimensions contiguous; a slice of a wider projection stays as it is."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _precision(device: torch.device) -> str:
    """Of products of float32 tiles: three TensorFloat-32 products give float32's digits."""
    tensor_cores = device.type == "cuda" and torch.version.hip is None
    if tensor_cores and torch.cuda.get_device_capability(device) >= (8, 0):
        return "tf32x3"
    return "ieee"


def _options(x: Tensor, B: Tensor) -> dict:
    p_block, n_block = (max(16, triton.next_power_of_2(size)) for size in (x.shape[3], B.shape[3]))
    return {
        "WIDE": wide(x),
        "CHUNK": CHUNK,
        "P_BLOCK": p_block,
        "N_BLOCK": n_block,
        "PRECISION": _precision(x.device),
        "num_warps": 4 if p_block * n_block <= 4096 else 8,
        "num_stages": 1,
    }


def _run_carry(gains, totals, first, last, backwards: bool) -> None:
    batch, chunks, heads, width, states = gains.shape
    grid = (triton.cdiv(width * states, CARRY_BLOCK), heads, batch)
    kind = {"REVERSED": backwards, "WIDE": wide(gains), "BLOCK": CARRY_BLOCK}
    _ssd_carry[grid](gains, totals, first, last, chunks, width * states, **kind)


def _ssd_forward(
    x, dt, A, B, C, D, dt_bias, initial_state, lengths
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, the state before each chunk (B, S, H, P, N), sums of a_t (B, S, H)."""
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    options, chunks = _options(x, B), triton.cdiv(length, CHUNK)
    starts = x.new_empty(batch, chunks, heads, width, states, dtype=torch.float32)
    totals = x.new_empty(batch, chunks, heads, dtype=torch.float32)
    last = x.new_empty(batch, heads, width, states, dtype=torch.float32)
    y = x.new_empty(x.shape)
    sizes, grid = (length, width, states, heads // groups), (heads, chunks, batch)
    _ssd_gains[grid](
        x, dt, A, B, dt_bias, lengths, starts, totals, *sizes, *row_steps(x, dt, B), **options
    )  # fmt: skip
    _run_carry(starts, totals, initial_state, last, backwards=False)
    _ssd_outputs[grid](
        x, dt, A, B, C, D, dt_bias, lengths, starts, y, *sizes,
        *row_steps(x, dt, B, C), **options,
    )  # fmt: skip
    return y, last, starts, totals


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lengths, *tensors):
        y, last, starts, totals = _ssd_forward(*tensors, lengths)
        ctx.save_for_backward(*tensors, lengths, starts, totals)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        grads = _ssd_backward(*ctx.saved_tensors, grad_y.contiguous(), grad_last.contiguous())
        needed = ctx.needs_input_grad[1:]
        return None, *(g if n else None for g, n in zip(grads, needed, strict=True))


def _ssd_backward(
    x, dt, A, B, C, D, dt_bias, first, lengths, starts, totals, grad_y, grad_last
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state."""
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    options, grid = _options(x, B), (heads, starts.shape[1], batch)
    sizes = (length, width, states, heads // groups)
    ends, grad_first = torch.empty_like(starts), torch.empty_like(starts[:, 0])
    _ssd_state_gradients[grid](
        dt, A, C, dt_bias, lengths, grad_y, ends, *sizes, *row_steps(dt, C), **options
    )  # fmt: skip
    _run_carry(ends, totals, grad_last, grad_first, backwards=True)
    grad_x, grad_dt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    grad_B, grad_C = (starts.new_empty(batch, length, heads, states) for _ in "BC")
    parts = totals.new_empty(3, *totals.shape)
    _ssd_gradients[grid](
        x, dt, A, B, C, D, dt_bias, lengths, starts, ends, grad_y,
        grad_x, grad_dt, grad_B, grad_C, parts, *sizes, *row_steps(x, dt, B, C), **options,
    )  # fmt: skip
    grad_B, grad_C = (g.unflatten(2, (groups, -1)).sum(3).to(B.dtype) for g in (grad_B, grad_C))
    of_A, of_D, of_bias = parts.sum((1, 2))
    of_first = None if first is None else grad_first.to(first.dtype)
    return (
        grad_x,
        grad_dt,
        of_A.to(A.dtype),
        grad_B,
        grad_C,
        of_D.to(D.dtype),
        of_bias.to(dt_bias.dtype),
        of_first,
    )


def ssd(x, dt, A, B, C, D, dt_bias, initial_state, lengths) -> tuple[Tensor, Tensor]:
    """`mixers.mamba2.ssd` for float32 and narrower inputs; y is 0 at padded steps."""
    x, B, C = (_dense_tail(t) for t in (x, B, C))
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if lengths is not None:
        lengths = lengths.to(x.device, torch.int32).contiguous()
    tensors = (x, dt, A.contiguous(), B, C, D, dt_bias, initial_state)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Ssd.apply(lengths, *tensors)
    return _ssd_forward(*tensors, lengths)[:2]


@torch.no_grad()
def ssd_step(state, x, dt, A, B, C, D, dt_bias) -> Tensor:
    """`mixers.mamba2.ssd_step`: `state` (B, H, P, N) is updated in place."""
    h = state.contiguous()
    x, B, C = (_dense_tail(t) for t in (x, B, C))
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    batch, heads, width, states = state.shape
    y = x.new_empty(x.shape)
    rows = (t.stride(0) for t in (x, dt, B, C))
    _ssd_step[(heads, batch)](
        h, x, dt, A, B, C, D, dt_bias, y, width, states, heads // B.shape[1], *rows,
        WIDE=wide(state),
        P_BLOCK=triton.next_power_of_2(width),
        N_BLOCK=triton.next_power_of_2(states),
    )  # fmt: skip
    if h is not state:
        state.copy_(h)
    return y
