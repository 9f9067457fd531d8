"""The Mamba-2 layer: one decay per head instead of one per channel and state.

    x, B, C = silu(conv(in_proj(u)))                      one short convolution over all three
    h_t     = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        per head; A is a negative number
    y_t     = h_t C_t + D x_t
    out     = out_proj(RMSNorm(y silu(z)))

(Dao and Gu, "Transformers are SSMs", arXiv:2405.21060.)  Because the decay of a head is a scalar, a
chunk of Q steps is a masked product like attention's, y = (L o C B^T) x with L_qs the decay from
step s to step q, and only the state passes from chunk to chunk: its section 6, which `ssd` follows.

Sizes: B batch, L steps, H heads of P channels, G groups of heads that share B and C, N states, Q
steps of a chunk, K taps.  Sums are float32 (float64 for float64), also under autocast.  On a CPU
the scan is a C++ kernel (`csrc/ssd.cpp`), elsewhere what this file does in PyTorch;
`config.scan_backend` chooses, as for the convolution.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vlmamba.configs.language import MambaConfig
from vlmamba.models.linear import Linear
from vlmamba.models.mixers.base import Mixer, StateShapes, initial_step_bias
from vlmamba.models.scan_backends.reference import step_sizes, wide_dtype
from vlmamba.models.selective_scan import backend_module, causal_conv1d, causal_conv1d_step
from vlmamba_core.errors import UserError

CHUNK = 64  # Q: twice as many double the work inside chunks, half as many that between them


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence above chunk by chunk.

    x: (B, L, H, P); dt: (B, L, H), used as softplus(dt + dt_bias); A, D, dt_bias: (H,);
    B, C: (B, L, G, N); initial_state: (B, H, P, N), zeros if None; lengths: (B,) integers in
    0..L, L if None; backend: one of `selective_scan`'s.

    Returns y (B, L, H, P) in x's dtype and the state (B, H, P, N) after each row's last real step,
    in float32 (float64 for float64 input).  Padded steps have step size 0, so they leave the
    state alone; their y means nothing.  Differentiable in every float argument.
    """
    run = getattr(backend_module(backend, x.device), "ssd", _ssd)
    with torch.autocast(x.device.type, enabled=False):
        return run(x, dt, A, B, C, D, dt_bias, initial_state, lengths)


def _ssd(x, dt, A, B, C, D, dt_bias, initial_state, lengths) -> tuple[Tensor, Tensor]:
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    wide = wide_dtype(x)
    size = min(CHUNK, length)
    dt = step_sizes(dt, dt_bias.to(wide), True, lengths).to(wide)
    # names of dimensions: b batch, c chunk, g group, r head of the group, q and s steps, p, n
    values = _chunked(x.to(wide) * dt.unsqueeze(-1), size).unflatten(3, (groups, -1))
    log_decay = _chunked(dt * A.to(wide), size).unflatten(3, (groups, -1))  # b c s g r
    b, c = (_chunked(t.to(wide), size) for t in (B, C))  # b c s g n

    log_decay = log_decay.permute(0, 1, 3, 4, 2)  # b c g r s
    between = _decay_between(log_decay)  # b c g r q s
    since_start = torch.exp(log_decay.cumsum(-1))  # b c g r q
    # inside each chunk
    scores = torch.einsum("bcqgn,bcsgn->bcgqs", c, b)
    y = torch.einsum("bcgrqs,bcsgrp->bcqgrp", scores.unsqueeze(3) * between, values)
    # what each chunk adds to the state, and the state before each chunk
    to_end = between[..., -1, :].permute(0, 1, 4, 2, 3)  # b c s g r
    gain = torch.einsum("bcsgrp,bcsgn->bcgrpn", values * to_end.unsqueeze(-1), b)
    shape = (batch, groups, heads // groups, width, states)
    first = gain.new_zeros(shape) if initial_state is None else initial_state.to(wide).view(shape)
    before, last = _carry(first, since_start[..., -1], gain)
    # what that state adds to the outputs
    read = torch.einsum("bcqgn,bcgrpn->bcqgrp", c, before)
    y = y + read * since_start.permute(0, 1, 4, 2, 3).unsqueeze(-1)
    y = y.reshape(batch, -1, heads, width)[:, :length]
    return (y + D.to(wide).unsqueeze(-1) * x.to(wide)).to(x.dtype), last.flatten(1, 2)


def _chunked(t: Tensor, size: int) -> Tensor:
    """(B, L, ...) -> (B, chunks, size, ...); the end is filled with zeros (dt = 0: no step)."""
    missing = -t.shape[1] % size
    t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))
    return t.unflatten(1, (-1, size))


def _decay_between(log_decay: Tensor) -> Tensor:
    """(..., Q) -> (..., Q, Q): exp(sum of log_decay over s+1..q) for s <= q, else 0.

    Summed for each pair anew: a difference of two running sums would lose the small ones.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    later = log_decay.unsqueeze(-1).expand(*log_decay.shape, size).masked_fill(~ones.tril(-1), 0.0)
    return torch.exp(later.cumsum(-2).masked_fill(~ones.tril(), -torch.inf))


def _carry(first: Tensor, decay: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk (b c g r p n) and after the last; decay (b c g r): of a chunk."""
    states = [first]
    for chunk in range(gain.shape[1]):
        states.append(decay[:, chunk, :, :, None, None] * states[-1] + gain[:, chunk])
    return torch.stack(states[:-1], dim=1), states[-1]


@torch.no_grad()
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> Tensor:
    """One token of `ssd`; `state` (B, H, P, N) is updated in place.  Not differentiable.

    x: (B, H, P); dt: (B, H); B, C: (B, G, N).  Returns y (B, H, P).
    """
    heads, wide = x.shape[1], state.dtype
    b, c = (t.to(wide).repeat_interleave(heads // t.shape[1], dim=1) for t in (B, C))  # (B, H, N)
    dt = F.softplus(dt.to(wide) + dt_bias.to(wide))
    state.mul_(torch.exp(dt * A.to(wide))[..., None, None])
    state.addcmul_((x.to(wide) * dt.unsqueeze(-1)).unsqueeze(-1), b.unsqueeze(2))
    y = (state @ c.unsqueeze(-1)).squeeze(-1)
    return (y + D.to(wide).unsqueeze(-1) * x.to(wide)).to(x.dtype)


class Mamba2Mixer(Mixer):
    """One Mamba-2 layer without norm and residual; the connector's scan uses it too.

    Raises UserError where the channels do not divide into heads, or the heads into groups.
    """

    bare: ClassVar[tuple[str, ...]] = ("conv1d", "norm")

    def __init__(self, config: MambaConfig):
        super().__init__()
        d_model, self.d_inner = config.d_model, config.d_inner
        self.d_state, self.n_groups = config.d_state, config.n_groups
        self.head_dim, self.n_heads = config.head_dim, self.d_inner // config.head_dim
        if self.n_heads * self.head_dim != self.d_inner or self.n_heads % self.n_groups:
            raise UserError(
                f"config: {self.d_inner} channels (expand * {d_model}) do not divide into heads of "
                f"head_dim={self.head_dim} in n_groups={self.n_groups}; change head_dim or n_groups"
            )
        self.conv_width = self.d_inner + 2 * self.n_groups * self.d_state
        self.backend = config.scan_backend
        self.in_proj = Linear(d_model, self.d_inner + self.conv_width + self.n_heads, bias=False)
        self.conv1d = nn.Conv1d(
            self.conv_width, self.conv_width, config.d_conv, groups=self.conv_width
        )
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=config.rms_eps)
        self.out_proj = Linear(self.d_inner, d_model, bias=False)

    @staticmethod
    def state_shapes(config: MambaConfig) -> StateShapes:
        """conv (K-1, Di + 2 G N) and ssm (H, P, N)."""
        width = config.d_inner + 2 * config.n_groups * config.d_state
        heads = config.d_inner // config.head_dim
        return StateShapes((config.d_conv - 1, width), (heads, config.head_dim, config.d_state))

    def initialize(self, n_layer: int) -> None:
        """state-spaces/mamba's Mamba2: A in -16..-1, D = 1, step sizes in 0.001..0.1."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        init.ones_(self.D)
        init.copy_(self.dt_bias, initial_step_bias(self.n_heads, self.D.device))
        self._initialize_projection(n_layer)

    def scan_flops(self) -> int:
        """Scores of a group, their product with x, and the state's gain and read-out."""
        scores = 2 * self.n_groups * CHUNK * self.d_state
        return scores + 2 * self.d_inner * CHUNK + 4 * self.d_inner * self.d_state

    def activation_bytes(self, element: int) -> tuple[int, int]:
        """The projected input; rows, products of chunks and their states, in float32 (a fit)."""
        projected = self.d_inner + self.conv_width + self.n_heads
        rows = 10 * self.d_inner + 6 * self.n_groups * self.d_state
        products = 2 * (self.n_heads + self.n_groups) * CHUNK
        states = 2 * self.d_inner * self.d_state // CHUNK
        return projected * element, 4 * (rows + products + states)

    def forward(
        self,
        u: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        recompute: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D), conv state (B, K-1, Di + 2 G N), ssm state (B, H, P, N).

        See Mixer.forward.
        """
        rows, states = self._split(self.in_proj(u)), (conv_state, ssm_state)
        return self._run_rest(self._conv_scan_project, rows, states, lengths, recompute)

    def _conv_scan_project(
        self,
        z: Tensor,
        xbc: Tensor,
        dt: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """After the first projection -> (B, L, D) and both states."""
        xbc, conv_state = causal_conv1d(
            xbc,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=conv_state,
            lengths=lengths,
            backend=self.backend,
        )
        x, b, c = self._heads(xbc)
        y, ssm_state = ssd(
            x, dt, self._decay(), b, c, self.D, self.dt_bias, ssm_state, lengths, self.backend
        )
        return self.out_proj(self._gated_norm(y.flatten(-2), z)), conv_state, ssm_state

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); both states are updated in place."""
        z, xbc, dt = self._split(self.in_proj(u))
        weight = self.conv1d.weight.squeeze(1)
        xbc = causal_conv1d_step(conv_state, xbc, weight, self.conv1d.bias, backend=self.backend)
        x, b, c = self._heads(xbc)
        y = ssd_step(ssm_state, x, dt, self._decay(), b, c, self.D, self.dt_bias)
        return self.out_proj(self._gated_norm(y.flatten(-2), z))

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z, the convolution's input and step sizes, in the published order."""
        z, xbc, dt = projected.split([self.d_inner, self.conv_width, self.n_heads], dim=-1)
        return z, xbc, dt

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N) of the convolution's output."""
        states = self.n_groups * self.d_state
        x, b, c = xbc.split([self.d_inner, states, states], dim=-1)
        by_group = (self.n_groups, self.d_state)
        heads = (self.n_heads, self.head_dim)
        return x.unflatten(-1, heads), b.unflatten(-1, by_group), c.unflatten(-1, by_group)

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm(y silu(z)) over the channels of each group, in float32."""
        gated = y.float() * F.silu(z.float())
        grouped = gated.unflatten(-1, (self.n_groups, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], eps=self.norm.eps).flatten(-2)
        return (normed * self.norm.weight.float()).to(self.norm.weight.dtype)
