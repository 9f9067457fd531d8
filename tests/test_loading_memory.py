"""Loading keeps one copy of the weights: memory of this process and mapped files together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_wrapped_language_model import FAMILIES
from tiny import TINY_CLIP, tiny_config
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES
from vlmamba.weight_files import in_dtype

LIMIT = 1.15  # of the weights in the wanted dtype
VISION = TINY_CLIP | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
FIELDS = {"d_model": 512, "n_layer": 12, "vision_config": VISION}

# In a process of its own: a peak can be set back, but not what a suite has left in memory.
CHILD = """
import ctypes, gc, json, sys
import torch
from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.models.assemble import assemble
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES

def kib(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

def load(way, folder, dtype):
    config = VLMambaConfig.from_pretrained(folder)
    if way == "build":
        return assemble(config)
    if way == "init":
        return initial_model(config, STAGES["pretrain"], folder, [], 0)[0]
    return checkpoints.load(folder, dtype)[0]

def measured(way, small, large, dtype="auto"):
    load(way, small, dtype)  # what is imported and allocated once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier ones have left free is no room for this one
    before = kib("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    model = load(way, large, dtype)
    peak = kib("VmHWM") - before
    weights = sum(p.nbytes for p in model.parameters())
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    kinds = sorted({str(p.dtype) for p in model.parameters()})
    return {"ratio": 1024 * peak / weights, "finite": finite, "dtypes": kinds}

print(json.dumps([measured(*arguments) for arguments in json.loads(sys.argv[1])]))
"""


def published(folder: Path, dtype: torch.dtype, form: str, **fields) -> Path:
    """Folder with our config.json and the published parts that it names."""
    config = tiny_config(**fields)
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    (folder / "lm").mkdir(parents=True)
    original = {"d_model": config.d_model, "n_layer": config.n_layer, "vocab_size": 320}
    (folder / "lm" / "config.json").write_text(json.dumps(original))
    held = {
        f"backbone.{name}": torch.full(p.shape, 0.01, dtype=dtype)
        for name, p in model.language_model.named_parameters()
    }
    if form == "bin":
        torch.save(held, folder / "lm" / "pytorch_model.bin")
    else:
        save_file(held, folder / "lm" / "model.safetensors")
    encoder = CLIPVisionModel(CLIPVisionConfig(**fields.get("vision_config", TINY_CLIP)))
    encoder.to(dtype).save_pretrained(folder / "clip")
    config.language_model_id, config.vision_model_id = str(folder / "lm"), str(folder / "clip")
    config.save_pretrained(folder)
    return folder


def saved(folder: Path, dtype: torch.dtype, tokenizer, **fields) -> Path:
    config = tiny_config(**fields)
    VLMambaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    VLMambaProcessor.from_config(config, tokenizer).save_pretrained(folder)
    return folder


def measured(jobs: list[list[str]]) -> list[dict]:
    command = [sys.executable, "-c", CHILD, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
def test_weights_are_in_memory_once_however_they_are_loaded(tmp_path, tokenizer):
    jobs, wanted = [], []
    for number, (form, dtype) in enumerate(
        [("bin", torch.float32), ("bin", torch.bfloat16), ("safetensors", torch.bfloat16)]
    ):
        small = published(tmp_path / f"{number}small", dtype, form)
        large = published(tmp_path / f"{number}large", dtype, form, **FIELDS)
        jobs.append(["build", str(small), str(large)])
        wanted.append("torch.float32")
    for dtype, way, asked in (
        (torch.float32, "load", "auto"),
        (torch.float32, "load", "bfloat16"),
        (torch.bfloat16, "load", "float32"),
        (torch.float32, "init", "auto"),
    ):
        name = f"{str(dtype)[6:]}{way}{asked}"
        small = saved(tmp_path / f"{name}small", dtype, tokenizer)
        large = saved(tmp_path / f"{name}large", dtype, tokenizer, **FIELDS)
        jobs.append([way, str(small), str(large), asked])
        wanted.append("torch.float32" if asked == "auto" else f"torch.{asked}")
    for job, dtype, found in zip(jobs, wanted, measured(jobs), strict=True):
        print(job, found)
        assert found["dtypes"] == [dtype]
        assert found["finite"]
        assert 0.9 < found["ratio"] < LIMIT, job


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_a_changed_dtype_is_the_one_that_transformers_makes(wanted):
    """Of the demo, whose encoder has buffers of its own."""
    folder = checkpoints.BUNDLED["nano"]
    theirs = VLMambaForConditionalGeneration.from_pretrained(folder, dtype=wanted).state_dict()
    model, _ = checkpoints.load("nano", dtype=wanted)
    ours = model.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
        assert ours[name].stride() == tensor.stride(), name
    assert model.dtype == model.config.dtype == wanted


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
def test_rotary_frequencies_keep_their_precision(name, tmp_path, tokenizer):
    """In bfloat16, tokens far apart would be read at other distances."""
    text = {"model_type": name, **FAMILIES[name], "vocab_size": len(tokenizer)}
    config = VLMambaConfig(text_config=text, vision_config=dict(TINY_CLIP))
    VLMambaForConditionalGeneration(config).save_pretrained(tmp_path)
    VLMambaProcessor.from_config(config, tokenizer).save_pretrained(tmp_path)
    load = VLMambaForConditionalGeneration.from_pretrained
    theirs = dict(load(tmp_path, dtype=torch.bfloat16).named_buffers())
    model, _ = checkpoints.load(str(tmp_path), dtype=torch.bfloat16)
    ours = dict(model.named_buffers())
    assert any(key.endswith("inv_freq") for key in ours)
    for key, buffer in theirs.items():
        assert ours[key].dtype == buffer.dtype, key
        assert torch.equal(ours[key], buffer), key


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_takes_over_its_parts_and_nothing_is_left_empty(stage, tmp_path, tokenizer):
    """The encoder's unsaved buffers and the output head included."""
    donor = saved(tmp_path / "donor", torch.float32, tokenizer)
    model, _ = initial_model(tiny_config(), STAGES[stage], str(donor), [], 0)
    theirs, _ = checkpoints.load(str(donor))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    others = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    assert not any(t.is_meta for t in tensors.values())
    assert model.language_model.lm_head.weight is model.language_model.embedding.weight
    fresh = "connector.linear_out.weight"
    for name, tensor in others.items():
        if stage == "finetune" or not name.startswith("connector."):
            assert torch.equal(tensors[name], tensor), name
    assert torch.equal(tensors[fresh], others[fresh]) == (stage == "finetune")
    again, _ = initial_model(tiny_config(), STAGES[stage], str(donor), [], 0)
    assert all(torch.equal(a, b) for a, b in zip(*map(all_of, (model, again)), strict=True))


def all_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def test_a_tensor_of_a_file_keeps_its_dtype_or_is_copied_once():
    held = torch.randn(3000, 11)
    assert in_dtype(held, torch.float32) is held
    expected = held.clone().bfloat16()
    assert torch.equal(in_dtype(held, torch.bfloat16), expected)
    indices = torch.arange(5)
    assert in_dtype(indices, torch.bfloat16) is indices
