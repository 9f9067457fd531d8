"""The decoding linear layer: equal to nn.Linear, whatever the sizes, and only where it may run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from vlmamba.models.linear import FEW_ROWS, Linear
from vlmamba.models.scan_backends import build

NEEDS_KERNELS = pytest.mark.skipif(build.kernels() is None, reason="no C++ compiler")


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 768, 80), (3, 17, 5), (8, 100, 1003), (2, 64, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_kernel_equals_the_product(dtype, shape, bias):
    rows, width, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(size, generator=generator).to(dtype)
        for size in ((rows, width), (outputs, width), (outputs,))
    )
    got = build.kernels().linear(x, w, b if bias else None)
    want = linear(x.double(), w.double(), b.double() if bias else None)
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_layer_equals_nn_linear_in_every_situation():
    layer = Linear(33, 21, bias=False)
    for shape in ((33,), (1, 33), (2, 4, 33), (FEW_ROWS + 1, 33)):
        x = torch.randn(shape)
        want = linear(x, layer.weight)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), want.detach())
        assert layer(x).requires_grad
    x = torch.randn(33, 2).t()  # not contiguous
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x, layer.weight))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_layer_runs_without_kernels(monkeypatch):
    monkeypatch.setattr("vlmamba.models.linear.kernels", lambda: None)
    layer, x = Linear(5, 3), torch.randn(1, 5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
