"""What the language model and the connector ask of a Mamba layer, whichever kind it is.

A `Mixer` maps a sequence to a sequence and carries two states from one piece of it to the next:
`conv`, the last inputs of its short convolution, and `ssm`, its hidden state.  Their shapes differ
from kind to kind; whoever clones, gathers or resumes them need not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from vlmamba.configs.language import MambaConfig
from vlmamba.models.offloaded import at_hand, offloads


class StateShapes(NamedTuple):
    """One row's states of one layer, without the batch dimension."""

    conv: tuple[int, ...]
    ssm: tuple[int, ...]


class Layer(nn.Module):
    """One layer of the language model without norm and residual, of any kind.

    starts_silent: its output is zero before it learns.
    """

    out_proj: nn.Linear
    starts_silent = False

    def initialize(self, n_layer: int) -> None:
        """How a layer starts in a model of n_layer layers."""
        self._initialize_projection(n_layer)

    @torch.no_grad()
    def silence(self) -> None:
        """The layer's output is zero from now on, until it learns."""
        self.out_proj.weight.zero_()

    def product_parameters(self) -> int:
        """Parameters that a token is multiplied with; A_log is a matrix of no product."""
        named = self.named_parameters()
        plain = sum(p.numel() for name, p in named if p.ndim >= 2 and name != "A_log")
        # weights of whole numbers are buffers, several numbers a byte (vlmamba.models.quantized)
        packed = (m for m in self.modules() if "weight" in m._buffers)
        return plain + sum(m.in_features * m.out_features for m in packed)  # type: ignore[operator,misc]

    def inner_flops(self, tokens: int) -> float:
        """FLOPs over one sequence besides the products with weights."""
        raise NotImplementedError

    def activation_bytes(self, element: int) -> tuple[int, int]:
        """Bytes a token that a backward pass keeps besides the layer's input.

        Of every layer, and further ones of the layer at work; element: bytes of the dtype.
        """
        raise NotImplementedError

    def _initialize_projection(self, n_layer: int) -> None:
        """The residual stream's variance does not grow with depth."""
        if self.starts_silent:
            init.zeros_(self.out_proj.weight)
            return
        init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        init.copy_(self.out_proj.weight, self.out_proj.weight / math.sqrt(n_layer))


class Mixer(Layer):
    """One Mamba layer; its parameters are named as published ones.

    bare: the submodules whose weights are read without calling them.
    """

    bare: ClassVar[tuple[str, ...]]

    @staticmethod
    def state_shapes(config: MambaConfig) -> StateShapes:
        """Shapes of a layer's states at the language model's width."""
        raise NotImplementedError

    def forward(
        self,
        u: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        lengths: Tensor | None = None,
        recompute: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> (B, L, D), conv state (B, *conv), ssm state (B, *ssm).

        `lengths` (B,): real tokens of each right-padded row; outputs beyond them are meaningless,
        states are those after each row's own last token.  With `recompute`, the backward pass
        makes again what it can rather than keep it.
        """
        raise NotImplementedError

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """One token: (B, D) -> (B, D); both states are updated in place."""
        raise NotImplementedError

    def read_bare(self) -> list[nn.Module]:
        """The modules that `bare` names."""
        return [self.get_submodule(name) for name in self.bare]

    def scan_flops(self) -> int:
        """FLOPs of the scan for one token; projections and convolution are not in it."""
        raise NotImplementedError

    def inner_flops(self, tokens: int) -> float:
        """Those of the scan."""
        return tokens * self.scan_flops()

    @torch.compiler.disable  # kernels and the hooks of checkpoint: opaque to torch.compile
    def _run_rest(
        self,
        rest: Callable[..., tuple[Tensor, Tensor, Tensor]],
        rows: tuple[Tensor, ...],
        states: tuple[Tensor | None, Tensor | None],
        lengths: Tensor | None,
        recompute: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rest(*rows, *states, lengths): all behind the first projection, made again if asked."""
        if offloads(self):
            with at_hand(*self.read_bare()):
                return rest(*rows, *states, lengths)
        fresh = all(state is None for state in states)  # a given one may be overwritten later
        if recompute and fresh and torch.is_grad_enabled():
            # it stops where all is back that a backward needs: out_proj is not computed again
            return checkpoint(rest, *rows, *states, lengths, use_reentrant=False)
        return rest(*rows, *states, lengths)


def initial_step_bias(channels: int, device: torch.device) -> Tensor:
    """(channels,) such that softplus(bias), the step size, is log-uniform in 0.001..0.1."""
    low, high = math.log(1e-3), math.log(1e-1)
    steps = torch.exp(torch.rand(channels, device=device) * (high - low) + low).clamp(min=1e-4)
    return steps + torch.log(-torch.expm1(-steps))
