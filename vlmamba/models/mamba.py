"""The Mamba language model, and its state as a value.

    x_t  = silu(conv(in_proj(u)))_t                       short causal convolution
    h_t  = exp(delta_t A) h_{t-1} + delta_t B_t x_t       selective scan, per channel
    y_t  = (C_t h_t + D x_t) silu(z_t);  out_proj(y)      gate and output

(Gu and Dao, "Mamba", section 3.)  Sizes: B batch, L sequence, D d_model, Di d_inner, N d_state,
K d_conv, R dt_rank; layout is channels-last (B, L, D).  A whole model state is a `MambaState`,
which can be cloned, gathered and resumed; right-padded rows leave it untouched.  `config.mixer`
chooses the layer: this one, or Mamba-2's (mamba2.py) in the same blocks, model and state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmamba.config import VLMambaConfig
from vlmamba.models.linear import Linear
from vlmamba.models.mamba2 import Mamba2Mixer
from vlmamba.models.mixer import Mixer, StateShapes, initial_step_bias
from vlmamba.models.selective_scan import (
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
)


@dataclass
class MambaState:
    """What a Mamba model remembers of a sequence; constant in size whatever its length.

    conv: (n_layer, B, K-1, Di), the last K-1 inputs of each convolution.
    ssm: (n_layer, B, Di, N) float32, the scan's hidden state.  (Mamba-2: see its state_shapes.)
    positions: how many columns of input (padding included) made it; transformers asks for it.
    The methods below `write` are the names that transformers' generate() calls on a cache.
    """

    conv: Tensor
    ssm: Tensor
    positions: int = 0

    @classmethod
    def zeros(
        cls, config: VLMambaConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> MambaState:
        """The state before the first token."""
        conv, ssm = MIXERS[config.mixer].state_shapes(config)
        return cls(
            torch.zeros((config.n_layer, batch, *conv), dtype=dtype, device=device),
            torch.zeros((config.n_layer, batch, *ssm), dtype=torch.float32, device=device),
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self.conv.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the state in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.conv, self.ssm))

    def clone(self) -> MambaState:
        """An independent copy."""
        return MambaState(self.conv.clone(), self.ssm.clone(), self.positions)

    def select(self, rows: Tensor) -> MambaState:
        """A new state with the given rows (int64 indices; repeats allowed)."""
        return MambaState(self.conv[:, rows], self.ssm[:, rows], self.positions)

    def write(self, other: MambaState) -> None:
        """Take over the content of `other`, in place where the shapes agree."""
        if self.conv.shape == other.conv.shape:
            self.conv.copy_(other.conv)
            self.ssm.copy_(other.ssm)
        else:
            self.conv, self.ssm = other.conv, other.ssm
        self.positions = other.positions

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input consumed so far."""
        return self.positions

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues from row beam_idx[i]."""
        self.write(self.select(beam_idx.to(self.conv.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        rows = torch.arange(self.batch, device=self.conv.device).repeat_interleave(repeats)
        self.write(self.select(rows))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.write(self.select(indices))

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.conv.zero_()
        self.ssm.zero_()
        self.positions = 0


class MambaMixer(Mixer):
    """One Mamba layer without norm and residual; the connector's scan uses it too.

    Parameter names are those of the published `state-spaces` checkpoints.
    """

    def __init__(self, config: VLMambaConfig, d_model: int | None = None):
        super().__init__(config, d_model)
        d_model = d_model or config.d_model
        d_inner = config.expand * d_model
        dt_rank = config.dt_rank if d_model == config.d_model else math.ceil(d_model / 16)
        self.d_inner, self.d_state, self.dt_rank = d_inner, config.d_state, dt_rank
        self.backend = config.scan_backend
        self.in_proj = Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = Linear(d_inner, dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = Linear(d_inner, d_model, bias=False)

    @staticmethod
    def state_shapes(config: VLMambaConfig) -> StateShapes:
        """conv (K-1, Di) and ssm (Di, N)."""
        d_inner = config.d_inner
        return StateShapes((config.d_conv - 1, d_inner), (d_inner, config.d_state))

    def initialise(self, n_layer: int) -> None:
        """state-spaces/mamba's `_init_weights` and its mixer: A_n = -n, D = 1, and step sizes."""
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.D.device)
        init.copy_(self.A_log, states.log().expand(self.d_inner, -1))
        init.ones_(self.D)
        bound = self.dt_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init.copy_(self.dt_proj.bias, initial_step_bias(self.d_inner, self.D.device))
        self._initialise_projection(n_layer)

    def scan_flops(self) -> int:
        """Per channel and state nine: discretise, update, read out (Mamba's own count)."""
        return 9 * self.d_inner * self.d_state

    def kept_bytes(self, element: int) -> tuple[int, int]:
        """x and z; the convolution's output, the step sizes and y."""
        return 2 * self.d_inner * element, 3 * self.d_inner * element

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Delta (before bias and softplus), A, B and C for convolved inputs x (..., Di)."""
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float()), b, c

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
        of keeping it: half the memory, for about a thirtieth of a step's time.
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
        delta, a, b, c = self._scan_inputs(x)
        y, ssm_state = selective_scan(
            x,
            delta,
            a,
            b,
            c,
            self.D,
            z,
            self.dt_proj.bias,
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
        delta, a, b, c = self._scan_inputs(x)
        y = selective_scan_step(
            ssm_state, x, delta, a, b, c, self.D, z, self.dt_proj.bias, backend=self.backend
        )
        return self.out_proj(y)


MIXERS: dict[str, type[Mixer]] = {"mamba": MambaMixer, "mamba2": Mamba2Mixer}


class MambaBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: x + mixer(norm(x)); the residual stream stays in float32."""

    def __init__(self, config: VLMambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.rms_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.residual_in_fp32 = config.residual_in_fp32

    def _norm(self, x: Tensor) -> Tensor:
        weight = self.norm.weight
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.norm.eps).to(weight.dtype)

    def forward(
        self,
        x: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D) and the two states, as MambaMixer.forward."""
        residual = x.float() if self.residual_in_fp32 else x
        again = not self.gradient_checkpointing  # else the whole block runs again anyway
        y, conv_state, ssm_state = self.mixer(self._norm(x), conv_state, ssm_state, lengths, again)
        return residual + y, conv_state, ssm_state

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); states in place."""
        residual = x.float() if self.residual_in_fp32 else x
        return residual + self.mixer.step(self._norm(x), conv_state, ssm_state)


class MambaLM(nn.Module):
    """The language model: embedding, n_layer blocks, final norm, tied output head."""

    def __init__(self, config: VLMambaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.rms_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        state: MambaState | None = None,
        lengths: Tensor | None = None,
        collect: list[Tensor] | None = None,
    ) -> tuple[Tensor, MambaState]:
        """(B, L, D) embeddings, continued from `state` -> (B, L, D) hidden states, new state.

        `lengths` (B,) int64: each right-padded row's real tokens; the state is taken at each
        row's own last one, and stays as it was where a row has none.  `collect` receives every
        layer's input (hidden states).
        """
        x = inputs_embeds
        conv_states, ssm_states = [], []
        for n, layer in enumerate(self.layers):
            if collect is not None:
                collect.append(x)
            conv, ssm = (None, None) if state is None else (state.conv[n], state.ssm[n])
            x, conv, ssm = layer(x, conv, ssm, lengths)
            conv_states.append(conv)
            ssm_states.append(ssm)
        positions = inputs_embeds.shape[1] + (0 if state is None else state.positions)
        new_state = MambaState(torch.stack(conv_states), torch.stack(ssm_states), positions)
        return self._final_norm(x), new_state

    def step(self, inputs_embeds: Tensor, state: MambaState) -> Tensor:
        """One token: (B, D) -> (B, D) hidden; `state` is updated in place."""
        x = inputs_embeds
        for n, layer in enumerate(self.layers):
            # a ModuleList does not say what its modules are
            x = layer.step(x, state.conv[n], state.ssm[n])  # type: ignore[operator]
        state.positions += 1
        return self._final_norm(x)

    def _final_norm(self, x: Tensor) -> Tensor:
        weight = self.norm_f.weight
        normed = F.rms_norm(x.float(), weight.shape, weight.float(), self.norm_f.eps)
        return normed.to(weight.dtype)
