"""Linear layers whose weights are whole numbers times a scale: decoding reads a quarter or an
eighth of the bytes.

    quantize(model.language_model, "int8")          # or "int4"; in place, after loading
    layer = QuantizedLinear.of(linear, KINDS["int4"], scale=learned)

    y = x (scale Q)^T + b        Q whole numbers, scale one for every group of a row's columns

Weights only: x and the sums stay as they are.  On a CPU the kernel of few rows
(`csrc/linear.cpp`) makes floats of Q in registers, so nothing but Q is read; sequences, and other
devices, multiply by weights made anew at every call.  int8 has one scale a row, int4 one for every
128 columns and keeps int8 in the head, where errors become other words.

Sizes: O outputs, I inputs, G groups.  Rounding to nearest is the plainest of all rules; a better
scale comes from elsewhere, as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmamba.models.language.base import LanguageModel
from vlmamba.models.linear import is_step, tokens
from vlmamba.models.products import product
from vlmamba.models.scan_backends.build import kernels
from vlmamba_core.names import choose

BLOCK = 32  # columns that int4 packs together: the first 16 in the low halves of 16 bytes


@dataclass(frozen=True)
class Kind:
    """How a weight is written: bits of a number, columns that share a scale (None: all), and the
    kind of the output head."""

    bits: int
    group: int | None
    head: str

    @property
    def largest(self) -> int:
        """The whole numbers lie between this and its negative."""
        return 2 ** (self.bits - 1) - 1


KINDS = {"int8": Kind(8, None, "int8"), "int4": Kind(4, 128, "int8")}


class QuantizedLinear(nn.Module):
    """A linear layer of whole numbers; not trained as such, but `scale` may be learned before.

    low_rank: what learned beside them, (..., I) -> (..., O) (vlmamba.models.low_rank).
    """

    weight: Tensor
    scale: Tensor
    low_rank: nn.Module | None

    def __init__(self, in_features: int, out_features: int, kind: Kind, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.group = min(kind.group or in_features, in_features)
        width = in_features if kind.bits == 8 else -(-in_features // BLOCK) * BLOCK // 2
        dtype = torch.int8 if kind.bits == 8 else torch.uint8
        self.register_buffer("weight", torch.zeros(out_features, width, dtype=dtype))
        groups = -(-in_features // self.group)
        self.register_buffer("scale", torch.ones(out_features, groups))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.low_rank = None

    @classmethod
    def of(cls, linear: nn.Linear, kind: Kind, scale: Tensor | None = None) -> QuantizedLinear:
        """The layer that is nearest to a linear one; scale (O, G): in place of the usual one."""
        weight = linear.weight.detach().float()
        layer = cls(linear.in_features, linear.out_features, kind, linear.bias)
        scale = usual_scale(weight, kind) if scale is None else scale.detach().float()
        if scale.shape != layer.scale.shape:
            raise ValueError(f"scale is {tuple(scale.shape)}, expected {tuple(layer.scale.shape)}")
        numbers = whole_numbers(weight, scale, kind)
        layer.weight = numbers if kind.bits == 8 else pack(numbers)
        layer.scale = scale.contiguous()
        return layer.to(weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        """Another device for everything; another type not for the scales, which kernels read."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights (O, I) as numbers of that type."""
        numbers = self.weight if self.kind.bits == 8 else unpack(self.weight, self.in_features)
        scale = self.scale.repeat_interleave(self.group, dim=1)[:, : self.in_features]
        return (numbers * (self.scale if self.scale.shape[1] == 1 else scale)).to(dtype)

    @property
    def numbers(self) -> tuple[Tensor, Tensor, int] | None:
        """What the kernels read: whole numbers, their scales, columns that share one; None where
        these are not all."""
        return None if self.low_rank is not None else (self.weight, self.scale, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        learns = torch.is_grad_enabled() and x.requires_grad
        y = _Frozen.apply(x, self) if learns else self.product(x)
        return y if self.low_rank is None else y + self.low_rank(x)

    def product(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O); single tokens (`is_step`) by the kernel on a CPU."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = tokens(x)
        if is_step(rows, x.dtype) and (module := kernels()) is not None:
            numbers = (self.weight, self.scale, self.group)
            y = module.quantized_linear(rows.contiguous(), *numbers, bias)
            return y.reshape(*x.shape[:-1], self.out_features)
        return product(x, self.dequantized(x.dtype), bias)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the bits."""
        return f"{self.in_features}, {self.out_features}, bits={self.kind.bits}, group={self.group}"


class _Frozen(torch.autograd.Function):
    """x (scale Q)^T of a layer that does not learn; its weights are made anew for the gradient,
    where keeping them would take the memory that packing has saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        return (gradient @ ctx.layer.dequantized(gradient.dtype)).to(ctx.dtype), None


def count_parameters(part: nn.Module) -> int:
    """Learned numbers of a part, each once: parameters, and packed weights, which are buffers."""
    packed = (m for m in part.modules() if isinstance(m, QuantizedLinear))
    numbers = sum(layer.in_features * layer.out_features for layer in packed)
    return sum(p.numel() for p in part.parameters()) + numbers


def usual_scale(weight: Tensor, kind: Kind) -> Tensor:
    """(O, I) -> (O, G): the largest weight of a group becomes the largest whole number."""
    group = min(kind.group or weight.shape[1], weight.shape[1])
    parts = [part.abs().amax(dim=1) for part in weight.split(group, dim=1)]
    return (torch.stack(parts, dim=1) / kind.largest).clamp(min=torch.finfo(torch.float32).tiny)


def whole_numbers(weight: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """(O, I) and (O, G) -> (O, I) int8, the nearest within the kind's range."""
    group = -(-weight.shape[1] // scale.shape[1]) if kind.group is None else kind.group
    wide = scale.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    return (weight / wide).round().clamp(-kind.largest, kind.largest).to(torch.int8)


def pack(numbers: Tensor) -> Tensor:
    """(O, I) int8 in -8..7 -> (O, bytes) uint8: two numbers a byte, plus 8, in blocks of 32."""
    blocks = nn.functional.pad(numbers + 8, (0, -numbers.shape[1] % BLOCK), value=8)
    low, high = blocks.unflatten(1, (-1, 2, BLOCK // 2)).to(torch.uint8).unbind(2)
    return (low | high << 4).flatten(1)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack` -> (O, columns) int8."""
    halves = packed.unflatten(1, (-1, BLOCK // 2))
    both = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)
    return both[:, :columns].to(torch.int8) - 8


def quantize(model: LanguageModel, kind: str) -> None:
    """Replace the projections of all blocks (`lora_targets`) and the heads, in place.

    An embedding that is also the head stays as it is.  Raises UserError for an unknown kind.
    """
    chosen = KINDS[choose("kind of quantized weights", kind, KINDS)]
    for block in model.blocks():
        for part in list(block.modules()):
            for name, child in list(part.named_children()):
                if name in model.lora_targets and isinstance(child, nn.Linear):
                    setattr(part, name, QuantizedLinear.of(child, chosen))
    for owner in model.heads:
        if isinstance(owner.lm_head, nn.Linear):
            owner.lm_head = QuantizedLinear.of(owner.lm_head, KINDS[chosen.head])
