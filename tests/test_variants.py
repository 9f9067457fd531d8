"""Each neighboring system has a preset of its published size: estimated, tried, profiled."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from harness.speed import models
from vlmamba import train

PRESETS = {
    "ml-mamba-2.7b": "finetune",
    "ml-mamba-2.7b-basic": "pretrain",
    "2.8b-plus-attention+siglip-so400m-384+mlp": "finetune",
    "2.8b-iaa+clip-l-336+mlp": "adaptors",
    "mamba-experts-2.8b+siglip-so400m-384+mlp": "finetune",
    "nano-transformer": "dialogue",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> list[str]:
    """A picture, and talks with and without it."""
    folder = tmp_path_factory.mktemp("world")
    Image.new("RGB", (30, 30), "red").save(folder / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red box"}]
    rows = [{"id": str(n), "image": "a.png", "conversations": talk} for n in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    return ["--data", str(folder / "data.json"), "--images", str(folder)]


@pytest.mark.parametrize(("preset", "stage"), PRESETS.items())
def test_a_preset_is_estimated_and_tried(preset, stage, world, capsys):
    words = ["--preset", preset, "--stage", stage]
    assert train.main([*words, "--estimate"]) == 0
    assert "parameters" in capsys.readouterr().out
    small = ["--cpu", "--tiny", "--dry-run", "--batch-size", "2", "--micro-batch", "2"]
    assert train.main([*words, *world, *small, "--dtype", "fp32"]) == 0
    assert "one update made" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        *("ml-mamba-2.7b", "ml-mamba-2.7b-basic", "cobra-3b", "pythia-vl-1b", "mamba-vl-790m"),
        *("vl-mamba-2.8b-plus-attention", "vl-mamba-2.8b-iaa", "vl-mamba-mamba-experts-2.8b"),
    ],
)
@torch.inference_mode()
def test_it_can_be_profiled(name):
    model = models.build(name, tiny=True, image_tokens=4)
    features = torch.rand(1, 4, model.config.vision_width)
    logits, cache = models.prefill(model, models.embed(model, torch.tensor([[5, 6, 7]]), features))
    before = cache.get_seq_length()
    assert models.step(model, logits.argmax(-1), cache).isfinite().all()
    assert (before, cache.get_seq_length()) == (7, 8)
    if name.startswith("ml-mamba"):
        assert model.config.connector == ("msc_basic" if "basic" in name else "msc")


@pytest.fixture(autouse=True)
def a_process_of_its_own():
    """Accelerate keeps its settings for a process; other files train with others."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
