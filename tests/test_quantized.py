"""Quantized linear layers: rounding, packing, and kernels equal to the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from test_wrapped_language_model import FAMILIES
from tiny import TINY_MIXERS, tiny_config
from torch import nn
from transformers import AutoConfig

from vlmamba.models.language import WrappedLM
from vlmamba.models.linear import decoding
from vlmamba.models.quantized import KINDS, QuantizedLinear, pack, quantize, unpack, usual_scale
from vlmamba.models.scan_backends import build
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import UserError
from vlmamba_core.names import QUANTIZED

NEEDS_KERNELS = pytest.mark.skipif(build.kernels() is None, reason="no C++ compiler")
SETS = dict.fromkeys((build.instruction_set(), "DEFAULT"))
SIZES = [(1, 1), (16, 5), (100, 7), (128, 3), (300, 9), (256, 64)]


def linear(size, bias=True):
    torch.manual_seed(0)
    return nn.Linear(*size, bias=bias)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 32, 100])
def test_packing_keeps_every_number(columns):
    numbers = torch.randint(-8, 8, (3, columns), dtype=torch.int8)
    packed = pack(numbers)
    assert packed.dtype == torch.uint8 and packed.shape[1] == -(-columns // 32) * 16
    assert torch.equal(unpack(packed, columns), numbers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_weight_is_off_by_half_a_step_at_most(kind, size):
    layer = linear(size)
    quantized = QuantizedLinear.of(layer, KINDS[kind])
    step = quantized.scale.repeat_interleave(quantized.group, dim=1)[:, : size[0]]
    off = (quantized.dequantized(torch.float32) - layer.weight).abs()
    assert bool((off <= step * 0.5001).all())


@NEEDS_KERNELS
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_multiplies_by_the_dequantized_weights(
    instructions, kind, size, dtype, monkeypatch
):
    module = build.load_kernels(instructions)
    monkeypatch.setattr("vlmamba.models.quantized.kernels", lambda: module)
    quantized = QuantizedLinear.of(linear(size), KINDS[kind])
    x = torch.randn(5, size[0]).to(dtype)
    want = x.double() @ quantized.dequantized(torch.float32).double().T + quantized.bias.double()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    with torch.inference_mode():
        got = quantized(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        assert torch.equal(quantized(x[2:3]), got[2:3])  # a row is its own
        sequence = quantized(x[None])[0]
        assert torch.equal(quantized(x[:, None])[:, 0], sequence)  # however long it is
        with decoding():
            assert torch.equal(quantized(x[:, None]), got[:, None])
    torch.testing.assert_close(sequence.double(), want, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.inference_mode()
def test_a_text_of_one_token_is_the_same_alone_and_beside_a_longer_one(name, kind):
    torch.manual_seed(0)
    model = VLMambaForConditionalGeneration(tiny_config(**TINY_MIXERS[name])).eval()
    language = model.language_model
    quantize(language, kind)
    ids = torch.randint(2, language.embedding.num_embeddings, (2, 9))
    _, cache = language(language.embed(ids[:, :4]))
    first = cache.select(torch.tensor([0]))
    alone, after = language(language.embed(ids[:1, 4:5]), first, torch.tensor([1]))
    beside, both = language(language.embed(ids[:, 4:]), cache, torch.tensor([1, 5]))
    assert torch.equal(alone[0, 0], beside[0, 0])
    assert torch.equal(after.ssm[:, 0], both.ssm[:, 0])


@NEEDS_KERNELS
@torch.inference_mode()
def test_a_step_of_a_wrapped_model_reads_the_whole_numbers_alone(monkeypatch):
    """Its layers take sequences of one token, for which weights would be made anew each time."""
    model = WrappedLM(AutoConfig.for_model("llama", **FAMILIES["llama"])).eval()
    quantize(model, "int8")
    _, cache = model(model.embed(torch.tensor([[5, 6, 7]])))
    made = []
    monkeypatch.setattr(QuantizedLinear, "dequantized", lambda *given: made.append(given))
    model.step(model.embed(torch.tensor([8])), cache)
    assert not made


def test_a_scale_from_elsewhere_is_taken():
    layer, kind = linear((256, 4)), KINDS["int4"]
    scale = 1.5 * usual_scale(layer.weight.detach(), kind)
    assert torch.equal(QuantizedLinear.of(layer, kind, scale).scale, scale)
    with pytest.raises(ValueError, match=r"scale is \(4, 1\), expected \(4, 2\)"):
        QuantizedLinear.of(layer, kind, scale[:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_has_nearly_the_same_logits_and_one_path(kind):
    torch.manual_seed(0)
    model = VLMambaForConditionalGeneration(tiny_config()).eval()
    language = model.language_model
    table = language.embedding.weight.clone()
    ids = torch.randint(2, language.embedding.num_embeddings, (2, 7))
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        quantize(language, kind)
        after = model(input_ids=ids).logits
        _, cache = language(language.embed(ids[:, :-1]))
        stepped = language.head(language.step(language.embed(ids[:, -1]), cache))
    assert torch.equal(language.embedding.weight, table)
    assert isinstance(language.lm_head, QuantizedLinear)
    spread = before.std()
    assert float((after - before).std() / spread) < (0.05 if kind == "int8" else 0.5)
    torch.testing.assert_close(stepped, after[:, -1], rtol=1e-4, atol=1e-5)


def test_the_names_are_those_of_the_command_lines():
    assert tuple(KINDS) == QUANTIZED


def test_an_unknown_kind_names_the_known_ones():
    model = VLMambaForConditionalGeneration(tiny_config())
    with pytest.raises(UserError, match="int8"):
        quantize(model.language_model, "int3")


@pytest.mark.parametrize("kind", QUANTIZED)
@torch.inference_mode()
def test_scales_keep_their_type(kind):
    """A model's own `.to(bfloat16)` asks every buffer; the kernels read float32 scales."""
    layer = QuantizedLinear.of(linear((48, 64)), KINDS[kind])
    x, scale = torch.randn(2, 48), layer.scale.clone()
    before = layer(x)
    assert layer.to(torch.bfloat16) is layer
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, scale)
    torch.testing.assert_close(layer(x.bfloat16()).float(), before, atol=0.1, rtol=0.05)
    assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    assert layer.to("meta").scale.is_meta
