"""LoRA beside packed weights: its equation, what learns, what is saved, answers in any batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_generation import picture
from test_validation import own_loss
from torch import nn

from harness.models.vlmamba import VLMambaModel
from vlmamba import checkpoints, quantize, train
from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.low_rank import LowRank, LowRankSettings, add, additions, packed_layers
from vlmamba.models.quantized import KINDS, QuantizedLinear
from vlmamba.training.estimate import estimate
from vlmamba.training.lora import attach
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import STAGES, freeze
from vlmamba_core.errors import UserError

HYPER = {"lr": 1e-2, "batch_size": 2, "micro_batch": 2, "dtype": "fp32"}


@pytest.fixture
def layer() -> QuantizedLinear:
    torch.manual_seed(0)
    made = QuantizedLinear.of(nn.Linear(160, 6), KINDS["int4"])
    made.low_rank = LowRank(made, 3, 7.0)
    nn.init.normal_(made.low_rank.up.weight)
    return made


def by_hand(layer: QuantizedLinear) -> torch.Tensor:
    """The whole weight (O, I) in float64, from the bytes of the file: numbers, scales, A and B."""
    state = layer.state_dict()
    numbers = torch.empty(6, 160, dtype=torch.float64)
    for column in range(160):
        block, place = divmod(column, 32)
        byte = state["weight"][:, 16 * block + place % 16]
        numbers[:, column] = (byte >> 4 if place >= 16 else byte & 15).double() - 8
        numbers[:, column] *= state["scale"][:, column // 128].double()
    up, down = state["low_rank.up.weight"].double(), state["low_rank.down.weight"].double()
    return numbers + 7 / 3 * up @ down


def test_the_layer_is_its_equation_and_only_a_and_b_learn(layer):
    x = torch.randn(5, 160, dtype=torch.float64).float().requires_grad_()
    weight, chosen = by_hand(layer), torch.randn(5, 6)
    expected = x.detach().double() @ weight.T + layer.bias.detach().double()
    y = layer(x)
    torch.testing.assert_close(y.detach().double(), expected, atol=1e-5, rtol=1e-5)
    (y * chosen).sum().backward()
    torch.testing.assert_close(x.grad.double(), chosen.double() @ weight, atol=1e-5, rtol=1e-5)
    for name, p in layer.named_parameters():
        assert (p.grad is not None) == name.startswith("low_rank.")
    with torch.inference_mode():  # the kernels of single tokens
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(layer(x[2:3]), layer(x)[2:3])


def test_a_gradient_in_bfloat16_is_that_of_the_same_weights(layer):
    x, chosen = torch.randn(5, 160, requires_grad=True), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y.float() * chosen).sum().backward()
    expected = chosen.double() @ by_hand(layer)
    torch.testing.assert_close(x.grad.double(), expected, atol=0.1, rtol=2e-2)


@pytest.fixture
def packed(tmp_path, model, processor) -> str:
    """A folder of packed weights."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--kind", "int4", "--out", str(tmp_path / "int4")]
    assert quantize.main(words) == 0
    return str(tmp_path / "int4")


def conversations(folder: Path) -> list[str]:
    """Flags of a run on a picture and a text."""
    Image.new("RGB", (30, 30), "red").save(folder / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red box"}]
    words = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "no more"}]
    rows = [
        {"id": "a", "image": "a.png", "conversations": talk},
        {"id": "b", "conversations": words},
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    return [
        "--data",
        str(folder / "data.json"),
        "--images",
        str(folder),
        "--cpu",
        "--dtype",
        "fp32",
    ]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train.jsonl").read_text().splitlines()]


def test_trained_saved_resumed_and_evaluated(packed, tmp_path, processor):
    shared = [*conversations(tmp_path), "--stage", "finetune", "--init", packed, "--lora", "4"]
    shared += ["--lr", "0.02", "--batch-size", "2", "--micro-batch", "2", "--save-every", "3"]
    out = tmp_path / "whole"
    assert train.main([*shared, "--steps", "6", "--out", str(out)]) == 0
    assert losses(out)[-1] < losses(out)[0] - 0.1
    before, after = checkpoints.load(packed)[0], checkpoints.load(str(out / "final"))[0]
    assert after.config.quantized == "int4"
    assert after.config.low_rank == {
        "rank": 4, "alpha": 8.0, "targets": ["in_proj", "out_proj", "x_proj"]
    }  # fmt: skip
    old, new = before.state_dict(), after.state_dict()
    added = {name for name in new if ".low_rank." in name}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(added) == 2 * 2 * 3 and set(new) - set(old) == added
    assert changed and all(name.startswith("connector.") for name in changed)
    evaluated = VLMambaModel(str(out / "final"), device="cpu", dtype="float32")
    asked = [
        Request(processor.conversation_prompt("What?"), f"{n % 2}", picture(n % 2))
        for n in range(4)
    ]
    asked += [Request(processor.conversation_prompt(q, images=0)) for q in ("And?", "What and?")]
    found = [GroupedGenerator(evaluated.model, processor).generate(asked, 5, n) for n in (1, 6)]
    assert found[0] == found[1]
    assert found[0] != GroupedGenerator(before, processor).generate(asked, 5)


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(packed, tmp_path):
    shared = [*conversations(tmp_path), "--stage", "finetune", "--init", packed, "--lora", "4"]
    shared += ["--lr", "0.02", "--batch-size", "1", "--micro-batch", "1", "--save-every", "2"]
    shared += ["--steps", "4"]
    out = tmp_path / "o"
    assert train.main([*shared, "--out", str(out)]) == 0
    whole = checkpoints.load(str(out / "final"))[0].state_dict()
    for gone in (out / "final", out / "checkpoints" / "step-00000004"):  # as if it had been killed
        shutil.rmtree(gone)
    (out / "summary.json").unlink()
    assert train.main([*shared, "--out", str(out), "--resume", "auto"]) == 0
    again = checkpoints.load(str(out / "final"))[0].state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_validation_has_no_dropout_and_changes_nothing_of_the_training(packed, tmp_path):
    shared = [*conversations(tmp_path), "--stage", "finetune", "--init", packed, "--lora", "4"]
    shared += ["--lora-dropout", "0.5", "--lr", "0.02", "--batch-size", "2", "--micro-batch", "2"]
    shared += ["--steps", "4"]
    (tmp_path / "images").mkdir()  # as `own_loss` has them
    shutil.copy(tmp_path / "a.png", tmp_path / "images")
    held_out = str(shutil.copy(tmp_path / "data.json", tmp_path / "held_out.json"))
    assert train.main([*shared, "--out", str(tmp_path / "plain")]) == 0
    seen = [*shared, "--out", str(tmp_path / "seen"), "--eval-data", held_out, "--eval-every", "1"]
    assert train.main(seen) == 0
    assert losses(tmp_path / "seen") == losses(tmp_path / "plain")
    measured = json.loads((tmp_path / "seen" / "train.jsonl").read_text().splitlines()[-1])
    expected = own_loss(tmp_path / "seen" / "final", tmp_path)
    assert measured["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_the_estimate_counts(packed):
    config = VLMambaConfig.from_pretrained(packed)
    found = estimate(config, STAGES["finetune"], Hyperparameters(**HYPER, lora=4))
    model = checkpoints.load(packed)[0]
    add(model.language_model, LowRankSettings(4, 8.0, model.language_model.lora_targets))
    assert found.trainable["language_model"] == sum(
        p.numel() for one in additions(model) for p in one.parameters()
    )
    layers = packed_layers(model)
    wide = VLMambaConfig(**config.to_dict() | {"quantized": None})
    whole = estimate(wide, STAGES["finetune"], Hyperparameters(**HYPER, lora=4))
    its_head = config.d_model * config.vocab_size  # packed it is no longer the embedding
    assert found.parameters["language_model"] == whole.parameters["language_model"] + its_head
    held = sum(b.nbytes for layer in layers for b in (layer.weight, layer.scale))
    spared = sum(layer.in_features * layer.out_features for layer in layers) - its_head
    assert whole.state_bytes - found.state_bytes == 4 * spared - held


def test_what_cannot_learn_is_refused(packed, tmp_path, capsys):
    model = checkpoints.load(packed)[0]
    freeze(model, STAGES["finetune"])
    attach(model, Hyperparameters(**HYPER, lora=4, lora_targets="out_proj"))
    with pytest.raises(UserError, match="--lora 4 --lora-alpha 8 --lora-targets out_proj"):
        attach(model, Hyperparameters(**HYPER, lora=2))
    attach(model, Hyperparameters(**HYPER, lora=4, lora_targets="out_proj"))  # goes on
    fields = model.config.to_dict()
    for wrong in ({"rank": 4}, {"rank": 0, "alpha": 8.0, "targets": ["out_proj"]}, 4):
        with pytest.raises(UserError, match="expected rank, alpha and targets"):
            VLMambaConfig(**fields | {"low_rank": wrong})
    with pytest.raises(UserError, match="no packed projection 'k_proj'"):
        add(model.language_model, LowRankSettings(2, 4.0, ("k_proj",)))
    words = [*conversations(tmp_path), "--stage", "finetune", "--init", packed, "--steps", "1"]
    assert train.main([*words, "--out", str(tmp_path / "o")]) == 2
    assert "cannot learn; give --lora RANK" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def a_process_of_its_own():
    """Accelerate keeps its settings for a process; other files train with others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
