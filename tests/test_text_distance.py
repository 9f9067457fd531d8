"""Objective text_distance against its equation, row by row, with tiny random text towers."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY_CLIP, tiny_config
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
)

from vlmamba.data.collate import Batch, collate
from vlmamba.data.examples import Example
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.training import lora
from vlmamba.training.objectives.text_distance import isometry
from vlmamba.training.recipe import Hyperparameters, build_objective
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

CPU = torch.device("cpu")
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
TEXT = {
    "vocab_size": 320,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}


def hyper(objective: str = "text_distance", **changes) -> Hyperparameters:
    sizes = {"lr": 1e-3, "batch_size": 3, "micro_batch": 3, "dtype": "fp32"}
    return Hyperparameters.from_flat({**sizes, "objective": objective, **changes})


def dual_encoder(kind: str, width: int):
    """A CLIP or SigLIP whose text embeddings have so many numbers, with large random weights."""
    vision = {key: value for key, value in TINY_CLIP.items() if key != "model_type"}
    if kind == "clip":
        text = TEXT | {"hidden_size": 24, "projection_dim": width, "eos_token_id": 2}
        sides = {"text_config": text, "vision_config": vision | {"projection_dim": width}}
        model = CLIPModel(CLIPConfig(**sides, projection_dim=width))
    else:
        text = TEXT | {"hidden_size": width}
        sides = {"text_config": text, "vision_config": vision | {"hidden_size": 24}}
        model = SiglipModel(SiglipConfig(**sides))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def build(tokenizer, tmp_path):
    """A function: a VLM whose encoder is from a dual encoder on disk, its processor, the latter."""

    def make(kind: str = "clip", width: int = 16):
        dual = dual_encoder(kind, width)
        dual.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        vision = dict(TINY_CLIP) if kind == "clip" else TINY_CLIP | SIGLIP
        config = tiny_config(vision_config=vision, vision_model_id=str(tmp_path / kind))
        torch.manual_seed(0)
        model = VLMambaForConditionalGeneration(config)
        return model, VLMambaProcessor.from_config(config, tokenizer), dual

    return make


def answers(config, lengths=(2, 9, 5, 0)) -> Batch:
    """Rows with so many supervised tokens in two pieces; every second row has a picture."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(2, 300, (length + 4,), generator=generator)
        labels = ids.clone()
        labels[[0, 1, 3, -1]] = IGNORE  # what is asked, and between two answers
        pixels = None
        if number % 2:
            image = torch.full((config.num_image_tokens,), config.image_token_id)
            ids, labels = torch.cat([image, ids]), torch.cat([image * 0 + IGNORE, labels])
            pixels = torch.rand(1, 3, 28, 28, generator=generator)
        rows.append(Example(ids, labels if length else labels * 0 + IGNORE, pixels))
    return collate(rows, pad_token_id=0)


@torch.no_grad()
def distances(model, dual, tokenizer, batch: Batch) -> float:
    """The sum over rows of tokens times 1 - cos, each text read alone on both sides."""
    total = 0.0
    for ids, labels in zip(batch.inputs["input_ids"], batch.inputs["labels"], strict=True):
        tokens = ids[labels != IGNORE]
        if not len(tokens):
            continue
        states = model.eval()(tokens[None], output_hidden_states=True).hidden_states[-1][0]
        own = states.double().mean(0)
        full = {"padding": "max_length"} if isinstance(dual, SiglipModel) else {}
        read = tokenizer(
            tokenizer.decode(tokens, skip_special_tokens=True),
            **full,
            truncation=True,
            max_length=12,
            return_tensors="pt",
        )
        theirs = dual.get_text_features(read["input_ids"]).pooler_output[0].double()
        kept = isometry(*sorted((len(own), len(theirs)))).double()
        if len(theirs) < len(own):
            theirs = kept.T @ theirs
        elif len(own) < len(theirs):
            own = kept.T @ own
        cosine = own @ theirs / (own.norm() * theirs.norm())
        total += float(1 - cosine) * int((labels[1:] != IGNORE).sum())
    return total


@pytest.mark.parametrize(
    ("kind", "width", "weight"),
    [("clip", 16, 1.0), ("clip", 48, 0.3), ("clip", 32, 1.0), ("siglip", 16, 2.0)],
)
def test_the_loss_is_the_equation(build, kind, width, weight):
    model, processor, dual = build(kind, width)
    batch = answers(model.config)
    objective = build_objective(hyper(text_weight=weight))
    objective.prepare(model, processor, CPU)
    with torch.no_grad():
        plain = float(build_objective(hyper("cross_entropy"))(model.train(), batch, CPU))
    term = distances(model, dual, processor.tokenizer, batch)
    assert term > 1
    found = objective(model.train(), batch, CPU)
    assert float(found.detach()) == pytest.approx(plain + weight * term, rel=1e-4)


def test_words_of_patches_are_no_part_of_a_caption(build):
    """They are learned, but the distance is that of what the answers say."""
    model, processor, _ = build()
    terms = []
    for told in (False, True):
        batch, losses = answers(model.config), []
        if told:
            with_picture = (batch.inputs["input_ids"] == model.config.image_token_id).any(dim=1)
            batch.inputs["labels"][with_picture, 1:4] = torch.tensor([7, 8, 9])
        for weight in (0.0, 1.0):
            objective = build_objective(hyper(text_weight=weight))
            objective.prepare(model, processor, CPU)
            losses.append(float(objective(model.train(), batch, CPU).detach()))
        terms.append(losses[1] - losses[0])
    assert terms[1] == pytest.approx(terms[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_reads_from_the_left_whatever_its_tokenizer_did_last(build, tokenizer, kind):
    losses = []
    for side in ("right", "left"):
        torch.manual_seed(0)
        tokenizer(["a b", "a"], padding=True, padding_side=side)  # what it saves as its own
        model, processor, _ = build(kind)
        objective = build_objective(hyper())
        objective.prepare(model, processor, CPU)
        losses.append(float(objective(model.train(), answers(model.config), CPU).detach()))
    assert losses[0] == losses[1]


def test_it_does_not_depend_on_how_the_batch_is_cut(build):
    model, processor, _ = build()
    objective = build_objective(hyper())
    objective.prepare(model, processor, CPU)
    whole = answers(model.config, (2, 9, 5, 3))
    pixels = whole.inputs["pixel_values"]
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        inputs = {name: whole.inputs[name][rows] for name in ("input_ids", "labels")}
        inputs["pixel_values"] = pixels[rows.start // 2][None]
        n = int((inputs["labels"][:, 1:] != IGNORE).sum())
        parts.append(Batch(inputs, n, n, 0, []))
    with torch.no_grad():
        one_by_one = sum(float(objective(model.train(), part, CPU)) for part in parts)
        assert one_by_one == pytest.approx(float(objective(model, whole, CPU)), rel=1e-5)


def test_learning_brings_the_texts_together_and_leaves_the_tower_alone(build):
    model, processor, dual = build()
    objective = build_objective(hyper())
    objective.prepare(model, processor, CPU)
    batch, tower = answers(model.config), objective.tower.model
    before = distances(model, dual, processor.tokenizer, batch)
    weights = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=1e-2)
    for _ in range(10):
        objective(model.train(), batch, CPU).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distances(model, dual, processor.tokenizer, batch) < 0.5 * before
    assert all(p.grad is None for p in tower.parameters())
    assert all(torch.equal(weights[name], t) for name, t in tower.state_dict().items())


@pytest.mark.parametrize(("narrow", "wide"), [(16, 48), (32, 32)])
def test_the_map_keeps_lengths_and_angles(narrow, wide):
    kept = isometry(narrow, wide)
    torch.testing.assert_close(kept @ kept.T, torch.eye(narrow))
    assert torch.equal(kept, isometry(narrow, wide))


def test_encoders_without_a_text_tower_are_refused(build, tokenizer, tmp_path):
    model, processor, dual = build()
    objective = build_objective(hyper())
    vision = dict(TINY_CLIP) | {"model_type": "efficientnet_lite0", "hidden_size": 1280}
    model.config = tiny_config(vision_config=vision | {"patch_size": 28})
    with pytest.raises(UserError, match="text tower, CLIP or SigLIP; the model's is efficientnet"):
        objective.prepare(model, processor, CPU)
    model.config = tiny_config()
    with pytest.raises(UserError, match="give --set vision_model_id=ID"):
        objective.prepare(model, processor, CPU)
    alone = CLIPVisionModel(dual.config.vision_config)
    alone.save_pretrained(tmp_path / "vision")
    model.config = tiny_config(vision_model_id=str(tmp_path / "vision"))
    with pytest.raises(UserError, match="holds no text tower, only clip_vision_model"):
        objective.prepare(model, processor, CPU)
    model.config = tiny_config(vision_model_id=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot load the text tower"):
        objective.prepare(model, processor, CPU)


def test_a_language_model_that_does_not_learn_is_refused(build):
    model, processor, _ = build()
    objective = build_objective(hyper())
    objective.prepare(model, processor, CPU)
    model.language_model.requires_grad_(False)
    with pytest.raises(UserError, match="does not learn in this stage; give --stage finetune"):
        objective(model.train(), answers(model.config), CPU)


def test_lora_counts_as_learning(build):
    model, processor, _ = build()
    objective = build_objective(hyper(lora=2))
    objective.prepare(model, processor, CPU)
    lora.attach(model, hyper(lora=2))
    objective(model.train(), answers(model.config), CPU).backward()
    assert any(p.grad is not None for p in model.language_model.parameters())


def test_the_encoder_with_text_is_found_among_fused_ones(build, tmp_path):
    model, processor, _ = build()
    dino = {"model_type": "dinov2", "hidden_size": 24, "image_size": 28, "patch_size": 14}
    fused = {"model_type": "fused_vision_model", "encoders": [dino, dict(TINY_CLIP)]}
    model.config = tiny_config(vision_config=fused, vision_model_id=f"none,{tmp_path / 'clip'}")
    objective = build_objective(hyper())
    objective.prepare(model, processor, CPU)
    assert objective.tower.width == 16


def test_captions_are_no_padding_to_a_model_with_experts(build, tokenizer, tmp_path):
    """Its batches have a mask; a caption's own tokens count in it, what fills its row does not."""
    dual = dual_encoder("clip", 16)
    dual.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    experts = {"mixer": "mamba,experts", "n_layer": 4, "d_intermediate": 24, "n_experts": 4}
    config = tiny_config(
        **experts, vision_config=dict(TINY_CLIP), vision_model_id=str(tmp_path / "clip")
    )
    torch.manual_seed(0)
    model = VLMambaForConditionalGeneration(config)
    processor = VLMambaProcessor.from_config(config, tokenizer)
    batch = answers(config)
    lengths = [int((row != 0).sum()) for row in batch.inputs["input_ids"]]
    width = batch.inputs["input_ids"].shape[1]
    mask = torch.tensor([[int(t < n) for t in range(width)] for n in lengths])
    batch.inputs["attention_mask"] = mask
    objective = build_objective(hyper())
    objective.prepare(model, processor, torch.device("cpu"))
    loss = objective(model.train(), batch, torch.device("cpu"))
    loss.backward()
    assert torch.isfinite(loss)
