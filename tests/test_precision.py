"""bfloat16 training where the processor does not multiply bfloat16: the same products, at speed."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_MIXERS, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without(monkeypatch):
    """A processor that multiplies no bfloat16, whatever this one is."""
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: False)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def products() -> dict[str, object]:
    """Name -> a call that multiplies, of its three operands."""
    return {
        "mm": (lambda a, b: a @ b, draw(40, 300), draw(300, 24)),
        "bmm": (lambda a, b: a @ b, draw(3, 40, 300), draw(3, 300, 24)),
        "linear": (F.linear, draw(4, 10, 300), draw(24, 300), draw(24)),
        "baddbmm": (torch.baddbmm, draw(3, 40, 24), draw(3, 40, 300), draw(3, 300, 24)),
        "conv1d": (lambda x, w: F.conv1d(x, w, groups=8), draw(2, 8, 40), draw(8, 1, 4)),
        "conv2d": (F.conv2d, draw(2, 8, 12, 12), draw(6, 8, 3, 3), draw(6)),
        "attention": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            *(draw(2, 4, 30, 16, seed=seed) for seed in range(3)),
        ),
    }


@pytest.mark.parametrize("name", products())
def test_a_product_and_its_gradients_are_the_exact_ones_rounded(name):
    call, *operands = products()[name]
    exact = [x.double().requires_grad_() for x in operands]
    want = call(*exact)
    grad = draw(*want.shape, seed=3)
    want.backward(grad.double())
    given = [x.clone().requires_grad_() for x in operands]
    with precision.bfloat16_products(CPU):
        got = call(*given)
        got.backward(grad)
    pairs = zip((got, *(x.grad for x in given)), (want, *(x.grad for x in exact)), strict=True)
    for mine, right in pairs:
        assert mine.dtype == torch.bfloat16
        # half a unit of bfloat16's last place; sums that cancel keep float32's error, and
        # attention's gradients that of its result, from which they are taken
        error, kept = (mine.double() - right).abs(), 0.01 if name == "attention" else 1e-4
        assert bool((error <= right.abs() * 2**-8 * 1.01 + kept).all())


def test_other_numbers_and_other_machines_are_left_alone(monkeypatch):
    x, w = draw(8, 300).float(), draw(24, 300).float()
    with precision.bfloat16_products(CPU):
        assert torch.equal(F.linear(x, w), F.linear(x, w))
        assert F.linear(x, w).dtype == torch.float32
    monkeypatch.setattr(precision, "has_bfloat16_products", lambda: True)
    assert isinstance(precision.bfloat16_products(CPU), nullcontext)


class Products(TorchDispatchMode):
    """Collects what PyTorch's own counter of FLOPs counts, where it is given bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[object] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        narrow = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
        if narrow and func.overloadpacket in flop_registry:
            self.found.add(func)
        return func(*args, **(kwargs or {}))


def vlm(mixer: str, connector: str) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(connector_type=connector, **TINY_MIXERS[mixer])
    return VLMambaForConditionalGeneration(config)


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(2, 42).reshape(2, 20)
    ids[:, 3:7] = model.config.image_token_id
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, pixel_values=draw(2, 3, 28, 28).float(), labels=ids).loss


@pytest.mark.parametrize("connector", ["mlp", "vss_l2", "msc"])
@pytest.mark.parametrize("mixer", TINY_MIXERS)
def test_every_product_of_a_model_is_known(mixer, connector):
    model, seen = vlm(mixer, connector), Products()
    with seen:
        loss_of(model).backward()
    assert seen.found and seen.found <= precision.PRODUCTS.keys()


@pytest.mark.parametrize("mixer", TINY_MIXERS)
def test_a_model_s_gradients_are_those_of_bfloat16(mixer):
    own, ours = vlm(mixer, "vss_l2"), vlm(mixer, "vss_l2")
    loss_of(own).backward()
    with precision.bfloat16_products(CPU):
        loss_of(ours).backward()
        assert loss_of(ours).item() == pytest.approx(loss_of(own).item(), rel=5e-3)
    want, got = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for model in (own, ours)
    )
    assert float((got - want).norm() / want.norm()) < 0.03


def test_it_is_no_slower_than_pytorch_s_own_where_there_is_none():
    if torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor multiplies bfloat16")
    x, weight, seconds = draw(256, 512), draw(512, 512), {"own": [], "ours": []}
    for _ in range(12):
        for name, times in seconds.items():
            with precision.bfloat16_products(CPU) if name == "ours" else nullcontext():
                began = time.perf_counter()
                x @ weight
                times.append(time.perf_counter() - began)
    assert min(seconds["ours"]) < min(seconds["own"])
