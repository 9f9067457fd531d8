"""bfloat16 training on machines that do not multiply bfloat16: the same products by float32.

    with products_of(accelerator):
        accelerator.backward(loss)

A product of two bfloat16 numbers is exact in float32, and hardware that multiplies them sums in
float32 and rounds the sum.  So the products of matrices, convolutions and attention are taken of
bfloat16 operands in float32 and rounded after: what AVX-512's bfloat16 gives but for the order of
the sums, at float32's speed.  PyTorch's own way takes each number apart and is many times slower.
A run that was begun on the one machine goes on on the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmamba.models.scan_backends.build import has_bfloat16_products

_aten = torch.ops.aten
# What multiplies in PyTorch's operators below autograd -> how many of its results are rounded
PRODUCTS = {
    _aten.mm.default: 1,
    _aten.bmm.default: 1,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.convolution.default: 1,
    _aten.convolution_backward.default: 3,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 1,  # beside it: log of the sums
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}


def products_of(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """What a run multiplies in: as `bfloat16_products` where its mixed precision is bf16."""
    mixed = accelerator.mixed_precision == "bf16"
    return bfloat16_products(accelerator.device) if mixed else nullcontext()


def bfloat16_products(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, bfloat16 products are taken in float32 where the device has none of its own."""
    return nullcontext() if multiplies_bfloat16(device) else _Float32Products()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or has_bfloat16_products()


class _Float32Products(TorchDispatchMode):
    """Every one of PRODUCTS that is given bfloat16, in this thread, forward and backward."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, rounded = kwargs or {}, PRODUCTS.get(func)
        if rounded is None or not any(map(_is_bfloat16, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        named = {name: _widened(value) for name, value in kwargs.items()}
        found = func(*map(_widened, args), **named)
        if isinstance(found, Tensor):
            return found.bfloat16()
        results = (None if part is None else part.bfloat16() for part in found[:rounded])
        return (*results, *found[rounded:])


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _widened(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value
