"""A LoRA run's checkpoints on the way are loaded with their adapter, wherever they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import accelerator, data, images, make_run  # noqa: F401

from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import loop, lora, trainer_state
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES, freeze
from vlmamba_core.errors import UserError

IDS = torch.arange(2, 60).view(2, -1)


@pytest.fixture
def run(make_run):  # noqa: F811
    """Three steps of a LoRA run, a checkpoint after two."""
    run = make_run(steps=3, save_every=2, lora=3, lora_alpha=7.0, lr=5e-2)
    loop.train(run, accelerator())
    return run


@pytest.fixture
def step(run) -> Path:
    return trainer_state.checkpoints(run.out)[0]


@torch.no_grad()
def by_peft(step: Path, hyper) -> torch.Tensor:
    """The logits that peft's own layers compute from the untouched weights and A and B."""
    model = VLMambaForConditionalGeneration.from_pretrained(step, adapter=False)
    freeze(model, STAGES["finetune"])
    lora.attach(model, hyper)
    lora.restore(step, model)
    return model.eval()(IDS).logits


@torch.no_grad()
def test_a_step_of_a_lora_run_is_loaded_with_its_adapter(run, step):
    expected = by_peft(step, run.hyper)
    untouched = VLMambaForConditionalGeneration.from_pretrained(step, adapter=False)(IDS).logits
    assert (untouched - expected).abs().max() > 0.1
    ways = {
        "load": checkpoints.load(str(step))[0],
        "from_pretrained": VLMambaForConditionalGeneration.from_pretrained(step),
        "--init": initial_model(run.model.config, STAGES["finetune"], str(step), [], 0)[0].eval(),
    }
    for name, model in ways.items():
        torch.testing.assert_close(model(IDS).logits, expected, msg=name, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_final_model_gets_its_adapter_once(run):
    """`final/` has an adapter/ beside it too, already in its weights."""
    final, _ = checkpoints.load(str(run.out / "final"))
    expected = run.model.eval()(IDS).logits  # peft's layers are still in it
    torch.testing.assert_close(final(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def damaged(step: Path, what: str) -> None:
    path = step / "adapter" / "adapter_model.safetensors"
    held = load_file(path)
    name = next(iter(held))
    if what == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif what == "no rank":
        config = step / "adapter" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": None}))
    elif what == "shape":
        save_file(held | {name: torch.zeros(3, 5)}, path)
    elif what == "other tensor":
        save_file(held | {"what": torch.zeros(1)}, path)
    elif what == "no such layer":
        save_file({k.replace("layers.0", "layers.9"): t for k, t in held.items()}, path)
    elif what == "half":
        save_file({k: t for k, t in held.items() if "lora_A" in k}, path)
    else:
        shutil.rmtree(step / "adapter")
        (step / "adapter").mkdir()


@pytest.mark.parametrize(
    "what", ["cut", "no rank", "shape", "other tensor", "no such layer", "half", "empty"]
)
def test_a_damaged_adapter_is_refused_in_one_line(what, step):
    damaged(step, what)
    with pytest.raises(UserError) as caught:
        checkpoints.load(str(step))
    assert "adapter" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_file_has_peft_s_own_names(run, step):
    """As an independent reader expects them: a prefix, the layer, A or B, no name of an adapter."""
    names = set(load_file(step / "adapter" / "adapter_model.safetensors"))
    modules = [f"layers.{n}.mixer.{p}" for n in range(2) for p in ("in_proj", "x_proj", "out_proj")]
    expected = {
        f"base_model.model.language_model.{module}.lora_{half}.weight"
        for module in modules
        for half in "AB"
    }
    assert names == expected


@torch.no_grad()
def test_peft_s_adapters_of_every_projection_are_computed():
    """Those of dt_proj too, whose weight the scan otherwise reads without a call."""
    config = VLMambaConfig(d_model=32, n_layer=2, vocab_size=64)
    model = VLMambaForConditionalGeneration(config).eval()
    names = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    settings = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    ids = torch.randint(2, 64, (2, 9))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    logits, answer = adapted(input_ids=ids).logits, adapted.generate(ids, **options)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(answer, merged.generate(ids, **options))
