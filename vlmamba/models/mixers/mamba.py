"""The Mamba layer: a short causal convolution and a selective scan, gated.

    x_t  = silu(conv(in_proj(u)))_t                       short causal convolution
    h_t  = exp(delta_t A) h_{t-1} + delta_t B_t x_t       selective scan, per channel
    y_t  = (C_t h_t + D x_t) silu(z_t);  out_proj(y)      gate and output

(Gu and Dao, "Mamba", section 3.)  Sizes: B batch, L sequence, D d_model, Di d_inner, N d_state,
K d_conv, R dt_rank; layout is channels-last (B, L, D).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vlmamba.configs.language import MambaConfig
from vlmamba.models.linear import Linear, rows_product
from vlmamba.models.mixers.base import Mixer, StateShapes, initial_step_bias
from vlmamba.models.selective_scan import (
    causal_conv1d,
    causal_conv1d_step,
    selective_scan_projected,
    selective_scan_step,
)


class MambaMixer(Mixer):
    """One Mamba layer without norm and residual; a scanning connector's too.

    Parameter names are those of the published `state-spaces` checkpoints.
    """

    bare = ("conv1d", "dt_proj")

    def __init__(self, config: MambaConfig):
        super().__init__()
        d_model, d_inner, dt_rank = config.d_model, config.d_inner, config.dt_rank
        self.d_inner, self.d_state, self.dt_rank = d_inner, config.d_state, dt_rank
        self.backend = config.scan_backend
        self.in_proj = Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = Linear(d_inner, dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = Linear(dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = Linear(d_inner, d_model, bias=False)

    @staticmethod
    def state_shapes(config: MambaConfig) -> StateShapes:
        """conv (K-1, Di) and ssm (Di, N)."""
        d_inner = config.d_inner
        return StateShapes((config.d_conv - 1, d_inner), (d_inner, config.d_state))

    def initialize(self, n_layer: int) -> None:
        """state-spaces/mamba's `_init_weights` and its mixer: A_n = -n, D = 1, and step sizes."""
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.D.device)
        init.copy_(self.A_log, states.log().expand(self.d_inner, -1))
        init.ones_(self.D)
        bound = self.dt_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init.copy_(self.dt_proj.bias, initial_step_bias(self.d_inner, self.D.device))
        self._initialize_projection(n_layer)

    def scan_flops(self) -> int:
        """Per channel and state nine: discretise, update, read out (Mamba's own count)."""
        return 9 * self.d_inner * self.d_state

    def activation_bytes(self, element: int) -> tuple[int, int]:
        """x and z; the convolution's output, the step sizes and y."""
        return 2 * self.d_inner * element, 3 * self.d_inner * element

    def forward(
        self,
        u: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        recompute: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D), conv state (B, K-1, Di), ssm state (B, Di, N).

        `lengths` (B,): real tokens of each right-padded row; outputs beyond them are meaningless.
        With `recompute`, the backward pass makes what follows the first projection again instead
        of keeping it: half the memory, for a thirtieth (float32) to an eighth (bfloat16) of the
        time of a step.
        """
        x, z = self.in_proj(u).chunk(2, dim=-1)
        states = (conv_state, ssm_state)
        return self._run_rest(self._conv_scan_project, (x, z), states, lengths, recompute)

    def _conv_scan_project(
        self,
        x: Tensor,
        z: Tensor,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """After the first projection: x, z (B, L, Di) -> (B, L, D) and both states."""
        x, conv_state = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=conv_state,
            lengths=lengths,
            backend=self.backend,
        )
        mixed = self.x_proj(x)
        delta, bias = self._step_sizes(mixed[..., : self.dt_rank])
        y, ssm_state = selective_scan_projected(
            x,
            delta,
            self.A_log,
            mixed[..., self.dt_rank :],
            self.D,
            z,
            bias,
            initial_state=ssm_state,
            lengths=lengths,
            backend=self.backend,
        )
        return self.out_proj(y), conv_state, ssm_state

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); both states are updated in place."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        weight = self.conv1d.weight.squeeze(1)
        x = causal_conv1d_step(conv_state, x, weight, self.conv1d.bias, backend=self.backend)
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        (delta, bias), a = self._step_sizes(dt), -torch.exp(self.A_log.float())
        y = selective_scan_step(ssm_state, x, delta, a, b, c, self.D, z, bias, backend=self.backend)
        return self.out_proj(y)

    def _step_sizes(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """(..., R) -> step sizes (..., Di) before bias and softplus, and the bias (Di,).

        What an adapter library has wrapped around the projection is called, and adds the bias.
        """
        if "base_layer" in self.dt_proj._modules:
            return self.dt_proj(dt), torch.zeros_like(self.dt_proj.bias)
        return rows_product(dt, self.dt_proj.weight), self.dt_proj.bias
