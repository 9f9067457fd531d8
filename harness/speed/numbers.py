"""Prefill by length against attention, and decoding by rows, in float32, bfloat16 and int8 weights.

Ours and the baselines run in the same alternation, as in `language_model`.  transformers' models
are timed as shipped, and in float32 also with the faster library's products that ours take
(`vlmamba.models.products`): the first ratio is what a user gets, the second compares the models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.speed import models
from harness.speed.language_model import (
    ATTENTION,
    SIZE,
    VL_MAMBA_BFLOAT16,
    Models,
    direct_prefill,
    never_end,
    own_prefill,
)
from harness.speed.throughput import Shape, throughput
from harness.speed.timing import VL_MAMBA, Comparison, Contender, Effort, side_by_side
from vlmamba.generation import greedy
from vlmamba.models.linear import rows_product, use_fast_products
from vlmamba.models.quantized import quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration

LENGTHS = (128, 256, 512, 1024)
ROWS = (1, 4, 8, 16)
TOKENS = 8  # that a run decodes
FAST = ", same products"
INT8 = f"{VL_MAMBA}, int8 weights"
PRODUCTS = "its weight products alone"
SUMS = "a sum over the same weights"
NARROW = "_bf16"  # behind the kind of a comparison that is all in bfloat16


@dataclass
class Numbers:
    """The models of a run by the numbers they compute with, each built when first needed."""

    wide: Models
    narrow: Models
    _quantized: VLMambaForConditionalGeneration | None = None

    @property
    def quantized(self) -> VLMambaForConditionalGeneration:
        """Ours with int8 weights, in float32."""
        if self._quantized is None:
            self._quantized = models.build(f"vl-mamba-{SIZE}", device=self.wide.device)
            quantize(self._quantized.language_model, "int8")
            never_end(self._quantized)
        return self._quantized


@torch.inference_mode()
def prefill(length: int, narrow: bool, numbers: Numbers, effort: Effort) -> Comparison:
    """A prompt of `length` tokens: ours, and models with attention of about that size."""
    built = numbers.narrow if narrow else numbers.wide
    ids = torch.randint(2, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(built.device)
    runs: dict[str, Callable[[], object]] = {VL_MAMBA: own_prefill(built.vl_mamba, ids)}
    for name in ATTENTION:
        runs[name] = direct_prefill(built.direct(name), ids)
        if not narrow:
            runs[name + FAST] = with_fast_products(built.direct(name), runs[name])
    return Comparison(
        f"prefill_{length}{NARROW * narrow}",
        f"batch 1, {length} tokens, {'bfloat16' if narrow else 'float32'}",
        "run",
        side_by_side({name: Contender(run) for name, run in runs.items()}, effort, built.device),
    )


def with_fast_products(model: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with every linear layer of the model multiplying as ours do."""
    layers: list[nn.Module] = [m for m in model.modules() if type(m) is nn.Linear]

    def fast() -> None:
        use_fast_products(model)
        try:
            run()
        finally:
            for layer in layers:
                layer.__class__ = nn.Linear

    return fast


@torch.inference_mode()
def decode(rows: int, numbers: Numbers, effort: Effort) -> Comparison:
    """Seconds for a token of every row, in each kind of numbers."""
    contenders = {
        VL_MAMBA: numbers.wide.vl_mamba,
        VL_MAMBA_BFLOAT16: numbers.narrow.vl_mamba,
        INT8: numbers.quantized,
    }
    ids = torch.full((rows, 1), 2, device=numbers.wide.device)
    work = {name: Contender(_greedy(model, ids), TOKENS) for name, model in contenders.items()}
    timings = side_by_side(work, effort, numbers.wide.device)
    return Comparison(f"decode_{rows}", f"batch {rows}, {TOKENS} tokens", "token", timings)


@torch.inference_mode()
def decode_products(numbers: Numbers, effort: Effort) -> Comparison:
    """A token in float32 beside its weight products alone and a sum over the same weights.

    The sum reads what a token must read; what is left of a token beside the products is the scan,
    the norms and the calls.
    """
    model = numbers.wide.vl_mamba
    weights = [m.weight for m in model.language_model.modules() if isinstance(m, nn.Linear)]
    rows = [torch.randn(1, w.shape[1], device=w.device) for w in weights]

    def multiply() -> None:
        for _ in range(TOKENS):
            for x, weight in zip(rows, weights, strict=True):
                rows_product(x, weight)

    def add() -> None:
        for _ in range(TOKENS):
            for weight in weights:
                weight.sum()

    ids = torch.full((1, 1), 2, device=numbers.wide.device)
    runs = {VL_MAMBA: _greedy(model, ids), PRODUCTS: multiply, SUMS: add}
    work = {name: Contender(run, TOKENS) for name, run in runs.items()}
    timings = side_by_side(work, effort, numbers.wide.device)
    return Comparison("decode_products", f"batch 1, {TOKENS} tokens, float32", "token", timings)


def _greedy(model: VLMambaForConditionalGeneration, ids: Tensor) -> Callable[[], object]:
    hidden, state = model.language_model(models.embed(model, ids))
    return lambda: greedy(model, hidden[:, -1], state, TOKENS + 1)


def narrow_throughput(shape: Shape, numbers: Numbers, effort: Effort) -> Comparison:
    """`throughput` in bfloat16, on all sides."""
    found = throughput(shape, numbers.narrow, effort)
    return dataclasses.replace(found, kind=found.kind + NARROW)
