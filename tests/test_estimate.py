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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmamba.config import VLMambaConfig
from vlmamba.data.collate import Batch
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import loop
from vlmamba.training.estimate import estimate
from vlmamba.training.objectives import build_objective
from vlmamba.training.recipe import Hyperparameters
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
MODEL = {"d_model": 256, "n_layer": 8, "vocab_size": 16384, "vision_config": SIGLIP}
COMMON = {"lr": 1e-4, "batch_size": 2, "micro_batch": 2, "max_length": 768}
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
            loop.update(prepared, optimizer, batches, part.objective, accelerator)

    small = VLMambaConfig(**(model | {"d_model": 64, "n_layer": 1, "vocab_size": 64}))
    few = {"batch_size": 1, "micro_batch": 1, "max_length": small.num_image_tokens + 8}
    updates(small, Hyperparameters(**(hyper | few)), 1)
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    updates(VLMambaConfig(**model), Hyperparameters(**hyper), 2)
    return peak() - before


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
