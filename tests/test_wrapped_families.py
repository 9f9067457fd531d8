"""A language model of transformers through everything that ours goes through, by its preset.

Published folders in the hub's layout, `hf:FOLDER`, of Llama, GPT-NeoX and Zamba2 (a hybrid).
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_llava_data import conversation, write
from test_train_cli import train_in_two_processes
from test_wrapped_language_model import FAMILIES, language_model
from tiny import TINY_CLIP
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel

import tasks
from harness.data.images import decode, image_key
from harness.data.sources import Source
from harness.models.base import Limits, Picture, Request
from harness.models.vlmamba import VLMambaModel
from harness.run import main as evaluate
from vlmamba import checkpoints, train
from vlmamba.config import VLMambaConfig
from vlmamba.models.assemble import assemble
from vlmamba.models.language import WrappedLM
from vlmamba.processing import VLMambaProcessor
from vlmamba_core.errors import UserError

TWICE = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
NAMES = ("llama", "gpt_neox", "zamba2")
WORDS = 320  # of the tokenizer; the models' vocabulary is as large, so that `<image>` needs room


@pytest.fixture(scope="module", params=NAMES)
def published(request, tmp_path_factory, trained_tokenizer) -> Path:
    """A language model's folder as the hub has it: config.json, safetensors, tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param]["vocab_size"], before = WORDS, FAMILIES[request.param]["vocab_size"]
    model = language_model(request.param, TWICE if request.param == "zamba2" else {}).model
    FAMILIES[request.param]["vocab_size"] = before
    model.save_pretrained(folder / "lm")
    trained_tokenizer.save_pretrained(folder / "lm")
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).save_pretrained(folder / "clip")
    (folder / "images").mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (28, 28), color).save(folder / "images" / f"{i}.png")
    records = [
        {"image": f"{i % 4}.png", "conversations": conversation(answer=f"answer {i % 4}")}
        for i in range(8)
    ]
    write(folder, records)
    return folder


def arguments(published: Path, out: Path, stage: str, *more: str) -> list[str]:
    vision = json.dumps(TINY_CLIP)
    files = ["--data", str(published / "data.json"), "--images", str(published / "images")]
    numbers = ["--steps=3", "--batch-size=4", "--micro-batch=2", "--lr=1e-3", "--dtype=fp32"]
    return [
        *("--preset", f"hf:{published / 'lm'}+clip-l-336+mlp", "--stage", stage, *files),
        *("--set", f"vision_config={vision}", f"vision_model_id={published / 'clip'}"),
        *("--out", str(out), "--cpu", "--max-length=256", "--no-gradient-checkpointing"),
        *(*numbers, *more),
    ]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train.jsonl").read_text().splitlines()]


def test_the_stages_train_save_and_load_with_lora_and_checkpointing(published, tmp_path):
    pretrained = tmp_path / "pretrain"
    assert train.main(arguments(published, pretrained, "pretrain")) == 0
    model, _ = checkpoints.load(str(pretrained / "final"))
    theirs = WrappedLM(AutoConfig.from_pretrained(published / "lm"))
    theirs.load_published(published / "lm")
    for name, tensor in theirs.state_dict().items():  # frozen: as published, but for `<image>`
        assert torch.equal(model.language_model.state_dict()[name][: len(tensor)], tensor), name
    assert model.config.vocab_size == 384
    init = ["--init", str(pretrained / "final")]
    runs = {"plain": [], "lora": ["--lora", "4"], "saving": ["--gradient-checkpointing"]}
    for name, more in runs.items():
        assert train.main(arguments(published, tmp_path / name, "finetune", *init, *more)) == 0
    saving, plain = losses(tmp_path / "saving"), losses(tmp_path / "plain")
    assert saving[:2] == pytest.approx(plain[:2], rel=1e-5)
    # Adam divides by a gradient's own size: rounding of those next to zero grows with each update,
    # differently on each processor; test_checkpointing_sums_a_shared_block_s_gradients has them all
    assert saving == pytest.approx(plain, rel=1e-3)
    assert losses(tmp_path / "plain")[-1] < losses(tmp_path / "plain")[0]
    assert losses(tmp_path / "lora")[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=1e-5)
    learnt, _ = checkpoints.load(str(tmp_path / "lora" / "final"))
    [step] = (tmp_path / "lora" / "checkpoints").iterdir()
    merged, _ = checkpoints.load(str(step))  # the weights as they were, and the adapter beside them
    ids = torch.randint(2, WORDS, (1, 9))
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, learnt(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(learnt(input_ids=ids).logits, model(input_ids=ids).logits)


def test_estimate_and_a_tiny_dry_run(published, tmp_path, capsys):
    command = arguments(published, tmp_path / "never", "finetune")
    assert train.main([*command, "--estimate"]) == 0
    assert "together" in capsys.readouterr().out
    assert train.main([*command, "--dry-run", "--tiny"]) == 0
    assert "one update made, nothing written" in capsys.readouterr().out
    assert not (tmp_path / "never").exists()


def test_a_folder_without_a_language_model_is_one_line(published, tmp_path, capsys):
    (tmp_path / "config.json").write_text((published / "clip" / "config.json").read_text())
    for preset, message in (
        (f"hf:{tmp_path}", "expected a causal language model"),
        ("hf:nowhere/nothing", "cannot read the configuration of 'nowhere/nothing'"),
    ):
        command = arguments(published, tmp_path / "o", "pretrain", "--preset", preset)
        assert train.main(command) == 2
        assert message in capsys.readouterr().err


def test_settings_that_are_not_the_weights_own_are_refused(published, tmp_path):
    text = AutoConfig.from_pretrained(published / "lm")
    text.initializer_range = 0.5
    with pytest.raises(UserError, match="initializer_range is 0.02 in its config.json"):
        WrappedLM(text).load_published(published / "lm")


@pytest.fixture(scope="module")
def saved(published, tmp_path_factory, trained_tokenizer) -> Path:
    """A whole model of random weights whose answers depend on question and image."""
    folder = tmp_path_factory.mktemp("saved")
    config = VLMambaConfig.preset(
        f"hf:{published / 'lm'}+clip-l-336+mlp", vision_config=dict(TINY_CLIP)
    )
    config.vision_model_id = str(published / "clip")
    model = assemble(config)
    VLMambaProcessor.from_config(model.config, trained_tokenizer).save_pretrained(folder)
    torch.nn.init.normal_(model.connector.mlp[2].weight, std=1.0)
    model.save_pretrained(folder)
    return folder


def test_answers_do_not_depend_on_batch_or_order(saved):
    """Four questions of every demo benchmark, twelve tokens each."""
    requests = []
    source = Source.parse("demo", None)
    for name in ("pope", "mme", "gqa", "vqav2", "textvqa", "scienceqa", "mmbench", "easy_vqa"):
        task = tasks.load(name)
        table = source.load(task, "paper")
        for row in range(4):
            doc = table[row]
            picture = doc.get("image")
            shown = ()
            if picture is not None:
                shown = (Picture(image_key(picture), partial(decode, picture)),)
            prompt = task.prompt({k: v for k, v in doc.items() if k != "image"}, "paper")
            requests.append(Request(name, row, prompt, shown, Limits(12)))
    answers = {}
    for size in (1, 3, 8):
        for shuffled in (False, True):
            order = list(range(len(requests)))
            random.Random(size).shuffle(order) if shuffled else None
            found = [""] * len(requests)
            model = VLMambaModel(str(saved), device="cpu")
            model.answer(
                [requests[i] for i in order],
                Limits(12),
                size,
                lambda place, text, found=found, order=order: found.__setitem__(order[place], text),
            )
            answers[size, shuffled] = found
    reference = answers[1, False]
    assert len(set(reference)) > 8
    pairs = [pair for found in answers.values() for pair in zip(found, reference, strict=True)]
    assert sum(one != other for one, other in pairs) == 0


def test_what_is_not_exact_is_measured_at_load_and_told(saved, tmp_path, capsys, monkeypatch):
    family = json.loads((saved / "config.json").read_text())["text_config"]["model_type"]
    command = ["--tasks", "pope", "--limit", "2", "--model", str(saved)]
    assert evaluate([*command, "--out", str(tmp_path / "o")]) == 0
    told = json.loads((tmp_path / "o" / "record.json").read_text())["events"]
    if family == "zamba2":
        assert "zamba2 cannot continue a prompt exactly" in capsys.readouterr().err
        assert told[0].startswith("zamba2 cannot continue a prompt exactly")
        assert len(told) == 1
    else:
        assert told == []
    monkeypatch.setattr(WrappedLM, "batches_exactly", lambda self: False)
    assert evaluate([*command, "--out", str(tmp_path / "p")]) == 0
    told = json.loads((tmp_path / "p" / "record.json").read_text())["events"]
    assert told[-1].startswith(f"{family} is not exact in batches")


@pytest.mark.parametrize("published", ["zamba2"], indirect=True)
def test_a_hybrid_with_shared_blocks_is_sharded(published, tmp_path):
    """Zamba2's attention has one set of weights in several layers."""
    command = arguments(published, tmp_path / "one", "pretrain")
    assert train.main(command) == 0
    init = ["--init", str(tmp_path / "one" / "final")]
    assert train.main(arguments(published, tmp_path / "tuned", "finetune", *init)) == 0
    more = arguments(published, tmp_path / "two", "finetune", *init)
    train_in_two_processes("fsdp", *more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "tuned"), rel=1e-4)
    one, two = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("tuned", "two")
    )
    assert one.keys() == two.keys()
