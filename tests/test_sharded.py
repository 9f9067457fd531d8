"""FSDP reads the weights once a host: the other processes have no memory for them before shards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from test_train_cli import losses, train_in_two_processes, world  # noqa: F401
from tiny import TINY_CLIP, tiny_config

from vlmamba import train
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.training import sharded

WATCH = """
import json, os, sys
from pathlib import Path
from vlmamba import train
from vlmamba.training import sharded

def resident():
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

once, out = sharded.read_once, Path(sys.argv[1])

def watched(read, accelerator):
    calls = []
    before = resident()
    model, processor = once(lambda: (calls.append(1), read())[1], accelerator)
    weights = sum(p.nbytes for p in model.parameters())
    found = {"read": len(calls), "ratio": (resident() - before) / weights, "weights": weights}
    (out / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    return model, processor

sharded.read_once = watched
raise SystemExit(train.main(sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident sizes are Linux's")
@pytest.mark.parametrize("lora", [[], ["--lora", "4"]])
def test_one_process_reads_and_the_curve_is_that_of_one(lora, world, tokenizer, tmp_path):  # noqa: F811
    vision = TINY_CLIP | {"hidden_size": 256, "intermediate_size": 2048}
    config = tiny_config(d_model=512, n_layer=8, vision_config=vision)
    VLMambaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    VLMambaProcessor.from_config(config, tokenizer).save_pretrained(tmp_path / "model")
    script = tmp_path / "watch.py"
    script.write_text(WATCH)
    arguments = ["--init", str(tmp_path / "model"), "--stage", "finetune", "--recipe", "nano"]
    arguments += ["--data", str(world / "data.json"), "--images", str(world / "images"), "--cpu"]
    arguments += ["--dtype=fp32", "--lr=1e-4", "--steps=2", "--batch-size=4", "--micro-batch=2"]
    arguments += ["--max-length=96", *lora]
    two = ["--out", str(tmp_path / "two")]
    train_in_two_processes("fsdp", str(tmp_path), *arguments, *two, script=script)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["read"], second["read"]) == (1, 0)
    assert second["ratio"] < 0.25, second
    torch.manual_seed(0)
    assert train.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_on_gpus_autocast_alone_decides_about_numbers():
    """What accelerate makes of bf16 on GPUs; a run on CPUs never comes there."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    sharded.leave_numbers_to_autocast(accelerator)
    assert plugin.mixed_precision_policy is None
    sharded.leave_numbers_to_autocast(SimpleNamespace(state=SimpleNamespace()))
