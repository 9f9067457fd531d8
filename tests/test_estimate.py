"""`--estimate` against memory measured: full-length updates in a child process of their own.

The child's warm-up (a model of one layer) loads what a process loads once; what its largest
resident size exceeds that by is the update's.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from vlmamba.config import VLMambaConfig
from vlmamba.data.collate import Batch
from vlmamba.models.language import WrappedLM, memory
from vlmamba.models.language.wrapped import shrunk
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import loop
from vlmamba.training.estimate import estimate
from vlmamba.training.recipe import Hyperparameters, build_objective
from vlmamba.training.stages import get_stage
from vlmamba_core.tokens import IGNORE

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768}
SIZES |= {"num_attention_heads": 8, "vocab_size": 16384, "tie_word_embeddings": False}
HYBRID = {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "num_mem_blocks": 1}
HYBRID |= {"mamba_d_state": 16, "mamba_headdim": 32, "n_mamba_heads": 16}
WIDE = {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 6}


def wrapped(family: str, **settings: Any) -> dict[str, Any]:
    """A model around transformers' own language model of a family."""
    text = SIZES | {"model_type": family} | settings
    return {"text_config": text, "connector": "mlp", "vision_config": SIGLIP}


MODEL = {"d_model": 256, "n_layer": 8, "vocab_size": 16384, "vision_config": SIGLIP}
COMMON = {"lr": 1e-4, "batch_size": 2, "micro_batch": 2, "max_length": 768}
SHORT = {"micro_batch": 1, "max_length": 512}
SHAPES = {
    "pretrain, bf16, checkpointing": (
        "pretrain",
        MODEL,
        COMMON | {"dtype": "bf16", "gradient_checkpointing": True},
    ),
    "finetune, fp32": ("finetune", MODEL, COMMON | {"dtype": "fp32"}),
    "finetune, bf16, Mamba-2, two micro-batches": (
        "finetune",
        MODEL | {"mixer": "mamba2", "d_state": 64, "connector": "mlp"},
        COMMON | {"dtype": "bf16", "batch_size": 4},
    ),
    "adaptors, bf16": (
        "adaptors",
        MODEL | {"adaptors": [1, 4, 7], "adaptor_ends": True},
        COMMON | {"dtype": "bf16"},
    ),
    "finetune, fp32, Llama": (
        "finetune",
        wrapped("llama", num_key_value_heads=4),
        COMMON | {"dtype": "fp32"},
    ),
    "finetune, bf16, Llama of middle size": (
        "finetune",
        wrapped("llama", **WIDE),
        COMMON | SHORT | {"dtype": "bf16", "gradient_checkpointing": True},
    ),
    "finetune, bf16, GPT-NeoX": ("finetune", wrapped("gpt_neox"), COMMON | {"dtype": "bf16"}),
    "pretrain, bf16, Gemma 2, eager attention": (
        "pretrain",
        wrapped("gemma2", head_dim=32, num_key_value_heads=4),
        COMMON | {"dtype": "bf16"},
    ),
    "finetune, fp32, Zamba2, LoRA": (
        "finetune",
        wrapped("zamba2", **HYBRID),
        COMMON | SHORT | {"dtype": "fp32", "lora": 8},
    ),
    "pretrain, bf16, Zamba2, checkpointing": (
        "pretrain",
        wrapped("zamba2", **HYBRID),
        COMMON | {"dtype": "bf16", "gradient_checkpointing": True},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_within_15_percent_of_a_measured_peak(name):
    stage, model, hyper = SHAPES[name]
    root = Path(__file__).parent.parent
    # freed memory goes back at once, so that the resident size is what is in use
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([stage, model, hyper])],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.splitlines()[-1])
    found = estimate(VLMambaConfig(**model), get_stage(stage), Hyperparameters(**hyper))
    assert found.bytes_per_device(1, sharded=False) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_scan_that_loops_over_tokens_is_counted_in_shorter_rows(monkeypatch, checkpointing):
    config = AutoConfig.for_model("mamba", **SIZES | {"num_hidden_layers": 2, "state_size": 4})
    model = WrappedLM(config).train()
    if checkpointing:
        model.model.activation_checkpointing_enable()
    shorter = model.activation_bytes(2, 96, torch.bfloat16)
    monkeypatch.setattr(memory, "FEW", 96)
    whole = model.activation_bytes(2, 96, torch.bfloat16)
    assert shorter != whole
    assert astuple(shorter) == pytest.approx(astuple(whole), rel=0.05)


def test_gradients_count_at_the_loss_only_where_they_accumulate():
    def bytes_of(batch_size: int, devices: int, sharded: bool = False) -> int:
        stage, model, hyper = SHAPES["finetune, fp32"]
        hyper = Hyperparameters(**(hyper | {"batch_size": batch_size}))
        return estimate(VLMambaConfig(**model), get_stage(stage), hyper).bytes_per_device(
            devices, sharded
        )

    assert bytes_of(4, 1) - bytes_of(2, 1) == 4 * learning()
    assert bytes_of(4, 2) == bytes_of(2, 1)
    assert bytes_of(4, 2, sharded=True) < bytes_of(4, 2)


def learning() -> int:
    model = VLMambaForConditionalGeneration(VLMambaConfig(**MODEL))
    return sum(
        p.numel() for part in (model.connector, model.language_model) for p in part.parameters()
    )


def measure(stage: str, model: dict, hyper: dict) -> int:
    """Bytes by which two updates exceed what the process had before."""
    accelerator = loop.make_accelerator(Hyperparameters(**hyper), cpu=True)

    def updates(config: VLMambaConfig, chosen: Hyperparameters, number: int) -> None:
        part = SimpleNamespace(
            model=VLMambaForConditionalGeneration(config),
            stage=get_stage(stage),
            hyper=chosen,
            objective=build_objective(chosen),
            processor=None,
        )
        prepared, optimizer = loop.prepare(part, accelerator)
        batches = [full(config, chosen)] * (chosen.batch_size // chosen.micro_batch)
        for _ in range(number):  # the second has moments
            loop.update(prepared, optimizer, batches, part.objective, chosen.clip_norm, accelerator)

    small = VLMambaConfig(**(model | smaller(model)))
    few = {"batch_size": 1, "micro_batch": 1, "max_length": small.num_image_tokens + 8}
    updates(small, Hyperparameters(**(hyper | few)), 1)
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    updates(VLMambaConfig(**model), Hyperparameters(**hyper), 2)
    return peak() - before


def smaller(model: dict) -> dict:
    """What makes the warm-up's model of `model`."""
    if "text_config" not in model:
        adaptors = {"adaptors": [0]} if "adaptors" in model else {}
        return {"d_model": 64, "n_layer": 1, "vocab_size": 64} | adaptors
    return {"text_config": shrunk(VLMambaConfig(**model).text_config)}


def peak() -> int:
    """This program's largest resident size; getrusage's is the parent's, where that was larger."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def full(config: VLMambaConfig, hyper: Hyperparameters) -> Batch:
    """Sequences of the maximum length: an image, then text that is all labels."""
    patches, side = config.num_image_tokens, config.vision_config.image_size
    ids = torch.randint(2, config.vocab_size, (hyper.micro_batch, hyper.max_length))
    ids[:, :patches] = config.image_token_id
    labels = ids.masked_fill(ids == config.image_token_id, IGNORE)
    pixels = torch.randn(hyper.micro_batch, 3, side, side)
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    return Batch(inputs, int((labels[:, 1:] != IGNORE).sum()), ids.numel(), 0, [])


if __name__ == "__main__":
    print(measure(*json.loads(sys.argv[1])))
