"""One call a layer: the same as norm, mixer and residual, in any batch, only where it may run."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config
from torch.nn.utils import prune

from vlmamba.models.language import blocks
from vlmamba.models.mixers.fused import fused_norm, residual_sum
from vlmamba.models.quantized import KINDS, quantize
from vlmamba.models.scan_backends import build
from vlmamba.models.selective_scan import use_backend
from vlmamba.models.vlm import VLMambaForConditionalGeneration

pytestmark = pytest.mark.skipif(build.kernels() is None, reason="no C++ compiler")
BATCH = 3


@pytest.fixture
def calls(monkeypatch):
    """What every call of the fused step gave."""
    found = []

    def counted(*args):
        found.append(blocks.FUSED(*args))
        return found[-1]

    monkeypatch.setattr(blocks, "FUSED", blocks.fused_step, raising=False)
    monkeypatch.setattr(blocks, "fused_step", counted)
    return found


def model(dtype=torch.float32, kind=None, **overrides):
    torch.manual_seed(0)
    language = VLMambaForConditionalGeneration(tiny_config(**overrides)).to(dtype).eval()
    language = language.language_model
    for p in language.parameters():
        p.data += 0.02 * torch.randn_like(p)
    if kind:
        quantize(language, kind)
    return language


def steps(language, ids):
    """Hidden states after each token, and the cache."""
    cache = language.new_cache(len(ids))
    hidden = [language.step(language.embedding(column), cache) for column in ids.unbind(1)]
    return torch.stack(hidden, 1), cache


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"norm": "layer"}, {"residual_in_fp32": False}])
def test_equals_the_usual_way_in_every_batch(dtype, kind, overrides, calls, monkeypatch):
    language = model(dtype, kind, **overrides)
    ids = torch.randint(2, language.embedding.num_embeddings, (BATCH, 4))
    with torch.inference_mode():
        got, cache = steps(language, ids)
        assert calls and all(y is not None for y in calls)
        for row in range(BATCH):
            alone, state = steps(language, ids[row : row + 1])
            assert torch.equal(alone[0], got[row])
            assert torch.equal(state.ssm[:, 0], cache.ssm[:, row])
        monkeypatch.setattr(blocks, "fused_step", lambda *_: None)
        want, other = steps(language, ids)
    assert got.dtype == want.dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for name in ("conv", "ssm"):
        pair = getattr(cache, name), getattr(other, name)
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def test_where_it_may_not_run_it_does_not(calls):
    language = model()
    ids = torch.randint(2, language.embedding.num_embeddings, (BATCH, 1))
    steps(language, ids)  # with gradients
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        steps(language, ids)
    with torch.inference_mode(), use_backend("torch"):
        steps(language, ids)
    seen = []
    hook = language.layers[0].mixer.x_proj.register_forward_hook(lambda *a: seen.append(a))
    assert all(y is None for y in calls)
    with torch.inference_mode():
        steps(language, ids)
    hook.remove()
    assert len(seen) == 1 and calls[-1] is not None
    with torch.inference_mode():
        steps(model(mixer="mamba2"), ids)
    assert calls[-1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
@pytest.mark.parametrize("width", [1, 15, 16, 77])
def test_norms_equal_pytorchs(kind, dtype, width):
    torch.manual_seed(0)
    norm = kind(width, eps=1e-5)
    for p in norm.parameters():
        p.data = torch.randn_like(p)
    norm = norm.to(dtype)
    for x in (3 + torch.randn(2, 5, width), torch.randn(4, width).to(dtype)):
        if x.dtype not in (dtype, torch.float32):
            continue
        want = norm.double()(x.double())
        norm.to(dtype)
        assert fused_norm(norm, x) is None  # with gradients
        with torch.inference_mode():
            got = fused_norm(norm, x)
        assert got.dtype == dtype
        tolerance = 2e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 33), (5, 4096)])
def test_a_residual_sum_is_the_sum(shape):
    x, y = torch.randn(shape), torch.randn(shape).bfloat16()
    with torch.inference_mode():
        assert torch.equal(residual_sum(x, y), x + y)
        assert torch.equal(residual_sum(x, x), x + x)
    assert residual_sum(x, y.requires_grad_()).requires_grad


def test_pruned_and_parametrized_layers_are_computed_where_they_are_asked_for():
    ids = torch.randint(2, 20, (BATCH, 3))
    for part in ("out_proj", "conv1d", "in_proj"):
        language = model()
        target = getattr(language.layers[0].mixer, part)
        with torch.inference_mode():
            want, _ = steps(language, ids)
        prune.identity(target, "weight")
        with torch.inference_mode():
            got, _ = steps(language, ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
