"""Gains learned before rounding against their equations; packed models saved, loaded, refused."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from test_wrapped_language_model import FAMILIES
from tiny import TINY_CLIP
from torch import nn
from transformers import AutoConfig

from harness.controlled import cost
from harness.models.vlmamba import VLMambaModel
from vlmamba import checkpoints
from vlmamba import quantize as command
from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.learned_scale import ScaledLinear, attach, pack
from vlmamba.models.quantized import KINDS, QuantizedLinear, quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.serving.engine import Engine, describe

INT4 = KINDS["int4"]


@pytest.fixture
def layer() -> ScaledLinear:
    torch.manual_seed(0)
    scaled = ScaledLinear(nn.Linear(256, 6, bias=True), INT4)
    with torch.no_grad():
        scaled.gain.uniform_(0.7, 1.4)
    return scaled


def by_hand(layer: ScaledLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """W^ one weight at a time, and its derivative by the gain of its group."""
    weight, slope = torch.empty(6, 256), torch.empty(6, 256)
    for row in range(6):
        for column in range(256):
            group = column // 128
            values = [float(w) for w in layer.weight[row, 128 * group : 128 * group + 128]]
            s = max(map(abs, values)) / 7
            d = float(layer.gain.detach()[row, group])
            exact = float(layer.weight[row, column]) / d / s
            q = max(-7, min(7, round(exact)))
            weight[row, column] = q * s
            # as if round() were not there; nothing where the range cuts
            slope[row, column] = -exact / d * s if abs(round(exact)) <= 7 else 0.0
    return weight, slope


def test_the_layer_is_its_equation(layer):
    x = torch.randn(5, 256)
    weight, slope = by_hand(layer)
    y = layer(x)
    torch.testing.assert_close(y.detach(), x @ weight.T + layer.bias.detach(), atol=1e-5, rtol=1e-5)
    chosen = torch.randn(5, 6)
    (y * chosen).sum().backward()
    expected = ((chosen.T @ x) * slope).unflatten(1, (2, 128)).sum(-1)
    torch.testing.assert_close(layer.gain.grad, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_packed_computes_the_same(layer):
    x = torch.randn(5, 256)
    packed = layer.packed()
    assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (6, 128)
    torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)


def test_only_gains_learn_and_every_projection_has_one(model):
    gains = attach(model.language_model, "int4")
    learning = {id(p) for p in model.language_model.parameters() if p.requires_grad}
    assert learning == {id(gain) for gain in gains}
    assert len(gains) == model.config.n_layer * len(model.language_model.lora_targets)
    ids = torch.randint(2, 300, (2, 9))
    model.train()(ids, labels=ids).loss.backward()
    assert all(gain.grad is not None and gain.grad.any() for gain in gains)
    with torch.no_grad():
        before = model.eval()(ids).logits
        pack(model.language_model)
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, ScaledLinear) for m in model.modules())


@pytest.fixture
def saved(tmp_path, model, processor) -> str:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_packed_folder_is_the_model_quantized_after_loading(saved, kind, tmp_path, processor):
    out = tmp_path / "packed"
    assert command.main(["--model", saved, "--kind", kind, "--out", str(out)]) == 0
    loaded, _ = checkpoints.load(str(out))
    expected, _ = checkpoints.load(saved)
    quantize(expected.language_model, kind)
    ids = torch.randint(2, 300, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)
    layers = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * 3 + 1  # with the head
    asked = [Request(processor.conversation_prompt("What?", images=0)) for _ in range(3)]
    answers = [GroupedGenerator(m, processor).generate(asked, 5, 2) for m in (loaded, expected)]
    assert answers[0] == answers[1]
    narrow, _ = checkpoints.load(str(out), dtype="bfloat16")
    assert narrow(ids).logits.isfinite().all()
    assert narrow.language_model.lm_head.scale.dtype == torch.float32
    again = tmp_path / "again"  # saved once more, as training checkpoints are
    loaded.save_pretrained(again)
    third = VLMambaForConditionalGeneration.from_pretrained(again).eval()
    with torch.no_grad():
        assert torch.equal(third(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_are_counted_wherever_parameters_are(kind, tmp_path):
    """In a record of a run, on the page and in the costs of a study; its head is its own now."""
    out = tmp_path / "packed"
    assert command.main(["--model", "nano", "--kind", kind, "--out", str(out)]) == 0
    found = []
    for folder in ("nano", str(out)):
        asked = VLMambaModel(folder, device="cpu")
        engine = Engine(asked.model, asked.processor)
        engine.close()
        costs = cost.measure(asked.model, [4])
        parts = costs["language_model_parameters"] + costs["connector_parameters"]
        encoder = sum(p.numel() for p in asked.model.vision_encoder.parameters())
        assert describe(engine)["parameters"] == asked.parameters == parts + encoder
        found.append(asked.parameters)
    head = asked.model.language_model.lm_head
    assert found[1] == found[0] + head.in_features * head.out_features


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "zamba2"])
def test_a_packed_family_of_transformers_is_loaded_with_its_own_head(
    family, kind, tmp_path, tokenizer
):
    """Its head was a copy of the embedding, and is whole numbers now; shared blocks stay shared."""
    shape = FAMILIES[family] | {"vocab_size": 320, "tie_word_embeddings": True}
    text = AutoConfig.for_model(family, **shape)
    config = VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP))
    made = VLMambaForConditionalGeneration(config).eval()
    assert made.language_model.lm_head.weight is made.language_model.embedding.weight
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    first, out, again = (tmp_path / name for name in ("model", "packed", "again"))
    made.save_pretrained(first)
    VLMambaProcessor.from_config(config, tokenizer).save_pretrained(first)
    assert command.main(["--model", str(first), "--kind", kind, "--out", str(out)]) == 0
    expected, processor = checkpoints.load(str(first))
    quantize(expected.language_model, kind)
    loaded, _ = checkpoints.load(str(out))
    loaded.save_pretrained(again)
    processor.save_pretrained(again)
    asked = [
        Request(processor.conversation_prompt("What?"), str(n), Image.new("RGB", (28, 28), color))
        for n, color in enumerate(("red", "white", "black"))
    ]
    answers = [
        GroupedGenerator(model, processor).generate(asked, 6, 2)
        for model in (expected, loaded, checkpoints.load(str(again))[0])
    ]
    assert answers[0] == answers[1] == answers[2]
    assert isinstance(loaded.language_model.lm_head, QuantizedLinear)
    assert isinstance(loaded.language_model.embedding.weight, nn.Parameter)


def test_learned_gains_lose_less_than_rounding(saved, tmp_path, capsys):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red box"}]
    words = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "no more"}]
    rows = [
        {"id": "picture", "image": "a.png", "conversations": talk},
        {"id": "text", "conversations": words},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["--model", saved, "--out", str(tmp_path / "o"), "--steps", "12", "--batch-size", "2"]
    words += ["--data", str(tmp_path / "data.json"), "--images", str(tmp_path), "--lr", "0.02"]
    assert command.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    losses = {line.partition(":")[0]: float(line.split()[-1]) for line in printed[:3]}
    assert losses["loss with learned gains"] < losses["loss rounded to nearest"] - 0.01
    model, _ = checkpoints.load(str(tmp_path / "o"))
    assert model.config.quantized == "int4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "int3"], "unknown kind of quantized weights 'int3'"),
        (["--steps", "0"], "--steps is 0"),
        (["--images", "."], "--data and --images belong together"),
        (["--kind", "int8", "--images", ".", "--data", "config.json"], "--kind int4"),
        (["--data", "nothing.json", "--images", "."], "nothing.json is missing"),
    ],
)
def test_mistakes_are_one_line(words, message, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    out = str(tmp_path / "o")
    assert command.main(["--model", saved, "--out", out, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_neither_twice_nor_over_another_folder(saved, tmp_path, capsys):
    out = str(tmp_path / "o")
    assert command.main(["--model", saved, "--kind", "int8", "--out", out]) == 0
    assert command.main(["--model", saved, "--out", out]) == 2
    assert command.main(["--model", out, "--out", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert "exists; give a new folder" in error and "has int8 weights already" in error
