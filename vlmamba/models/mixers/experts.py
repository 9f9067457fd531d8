"""A sparse mixture of experts: each token goes through the `experts_per_token` MLPs it scores best.

    s     = softmax(router u)                                over E experts, float32
    y     = sum over the k best of  s_e / (sum of the k s) * MLP_e(u)

Blocks of it between Mamba layers are BlackMamba's layout (2402.01771: pattern "mamba,experts");
k = 2 with renormalized scores is Mixtral's and MoE-LLaVA's (2401.15947) rule.  No expert has a
capacity: one that drops what comes too late would make an answer depend on its neighbors in the
batch.  In training the layer keeps two terms for the loss, both means over real tokens:

    balance   E * sum over e of f_e p_e     f_e: share of the choices, p_e: mean score
    z         (logsumexp of the router's logits)^2

(Switch Transformer, 2101.03961; ST-MoE, 2202.08906.)  BlackMamba itself takes the one best expert
and balances by Sinkhorn, MoE-LLaVA drops tokens beyond a capacity: neither is done here.

Sizes: D d_model, E n_experts, k experts_per_token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba.configs.language import MambaConfig
from vlmamba.models.linear import rows_product
from vlmamba.models.mixers.base import Layer
from vlmamba.models.mixers.mlp import GatedMLP
from vlmamba.models.offloaded import at_hand


class Experts(Layer):
    """(B, L, D) or (B, D) -> the same shape, without norm and residual."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.each = config.experts_per_token
        self.weights = config.balance_loss, config.router_z_loss
        self.router = nn.Linear(config.d_model, config.n_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(config) for _ in range(config.n_experts))
        self.auxiliary: Tensor | None = None  # of the last training pass, not yet asked for
        self.chosen: Tensor | None = None  # (..., k) of the last pass: who went where

    def initialize(self, n_layer: int) -> None:
        """Each expert starts as any MLP does, by itself."""

    def silence(self) -> None:
        """Every expert's output is zero."""
        for expert in self.experts:
            expert.silence()  # type: ignore[operator]  # a GatedMLP

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """lengths (B,): real tokens of each right-padded row; others count for no loss."""
        with torch.autocast(u.device.type, enabled=False), at_hand(self.router):
            logits = rows_product(u.float(), self.router.weight.float())
        scores = logits.softmax(dim=-1)
        best, chosen = scores.topk(self.each, dim=-1)
        # of one alone the share would be 1, which teaches the router nothing (Switch, 2101.03961)
        share = best if self.each == 1 else best / best.sum(dim=-1, keepdim=True)
        self.chosen = chosen.detach()
        learns = self.training and torch.is_grad_enabled() and self.router.weight.requires_grad
        self.auxiliary = self._auxiliary(logits, scores, chosen, lengths) if learns else None
        rows = u.reshape(-1, u.shape[-1])
        chosen, share = chosen.reshape(-1, self.each), share.reshape(-1, self.each)
        y = torch.zeros_like(rows, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if not len(row) and not torch.is_grad_enabled():
                continue  # while learning it runs on no row: every parameter gets a gradient
            # rows of sequences stay a sequence: their number must not choose a product's kernel
            made = expert(rows[row][None])[0] if u.ndim > 2 else expert(rows[row])
            y = y.index_add(0, row, made.float() * share[row, place].unsqueeze(-1))
        return y.view(u.shape).to(u.dtype)

    def _auxiliary(
        self, logits: Tensor, scores: Tensor, chosen: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """Both terms, weighted (scalar)."""
        if lengths is not None:
            real = torch.arange(logits.shape[1], device=logits.device) < lengths.unsqueeze(1)
            logits, scores, chosen = logits[real], scores[real], chosen[real]
        experts = logits.shape[-1]
        taken = F.one_hot(chosen, experts).float().flatten(0, -2).mean(dim=0)
        balance = experts * (taken * scores.flatten(0, -2).mean(dim=0)).sum()
        z = logits.logsumexp(dim=-1).square().mean()
        return self.weights[0] * balance + self.weights[1] * z

    def product_parameters(self) -> int:
        """Of those that a token goes through."""
        one = self.experts[0].product_parameters()  # type: ignore[operator]  # a GatedMLP
        return self.router.weight.numel() + self.each * one

    def inner_flops(self, tokens: int) -> float:
        """None besides the projections."""
        return 0.0

    def activation_bytes(self, element: int) -> tuple[int, int]:
        """Of every expert a token goes through its rows in and out, and what an MLP keeps."""
        kept, at_work = self.experts[0].activation_bytes(element)  # type: ignore[operator]
        width = self.router.in_features
        return self.each * (kept + (4 + element) * width), self.each * at_work + 4 * width
