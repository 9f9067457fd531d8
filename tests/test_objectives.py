"""Objectives square_average and contrastive against their equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_config

from vlmamba.data.collate import Batch, collate
from vlmamba.data.examples import Example
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training.recipe import Hyperparameters, build_objective
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

CPU = torch.device("cpu")


def hyper(objective: str, **changes: float) -> Hyperparameters:
    sizes = {"lr": 1e-3, "batch_size": 3, "micro_batch": 3, "dtype": "fp32"}
    return Hyperparameters.from_flat({**sizes, "objective": objective, **changes})


def captions(config, lengths=(2, 9, 5)) -> Batch:
    """A picture and a caption of so many tokens in each row; labels on the caption."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(2, 300, (length,), generator=generator)
        image = torch.full((config.num_image_tokens,), config.image_token_id)
        pixels = torch.rand(1, 3, 28, 28, generator=generator)
        ignored = torch.full_like(image, IGNORE)
        rows.append(Example(torch.cat([image, ids]), torch.cat([ignored, ids]), pixels))
    return collate(rows, pad_token_id=0)


@torch.no_grad()
def test_square_average_weighs_a_token_by_its_answers_length(model):
    model.train()
    lengths = (2, 9, 5)
    batch = captions(model.config, lengths)
    objective = build_objective(hyper("square_average"))
    logits = model.eval()(batch.inputs["input_ids"], pixel_values=batch.inputs["pixel_values"])
    expected = 0.0
    for row, length in enumerate(lengths):
        labels = batch.inputs["labels"][row]
        for place in range(1, len(labels)):
            if labels[place] != IGNORE:
                scores = logits.logits[row, place - 1].double().log_softmax(-1)
                expected -= float(scores[labels[place]]) / math.sqrt(length)
    assert float(objective(model.train(), batch, CPU)) == pytest.approx(expected, rel=1e-5)
    assert objective.count(batch) == pytest.approx(sum(map(math.sqrt, lengths)))


def test_square_average_does_not_depend_on_how_the_batch_is_cut(model):
    model.train()
    objective = build_objective(hyper("square_average"))
    whole = captions(model.config)
    parts = [
        Batch({k: t[n : n + 1] for k, t in whole.inputs.items()}, 1, 1, 0, []) for n in range(3)
    ]
    assert sum(map(objective.count, parts)) == pytest.approx(objective.count(whole))
    with torch.no_grad():
        one_by_one = sum(float(objective(model, part, CPU)) for part in parts)
        assert one_by_one == pytest.approx(float(objective(model, whole, CPU)), rel=1e-5)


def contrast(model, batch, temperature: float) -> float:
    """Both ways by loops: pictures' mean tokens, captions read alone, row by row."""
    seen = model.connector(model.encode_images(batch.inputs["pixel_values"])).mean(1).double()
    told = []
    for ids, labels in zip(batch.inputs["input_ids"], batch.inputs["labels"], strict=True):
        caption = ids[labels != IGNORE]
        states = model(caption[None], output_hidden_states=True).hidden_states[-1]
        told.append(states[0].double().mean(0))
    total, n = 0.0, len(told)
    cosine = [
        [float(torch.cosine_similarity(v, u, dim=0)) / temperature for u in told] for v in seen
    ]
    for i in range(n):
        total += math.log(sum(math.exp(x) for x in cosine[i])) - cosine[i][i]
        total += math.log(sum(math.exp(row[i]) for row in cosine)) - cosine[i][i]
    return total / (2 * n)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 0.07), (0.3, 1.0)])
def test_contrastive_adds_the_contrast_of_pictures_and_captions(model, weight, temperature):
    batch = captions(model.config)
    settings = {"contrastive_weight": weight, "contrastive_temperature": temperature}
    objective = build_objective(hyper("contrastive", **settings))
    objective.prepare(model, None, CPU)
    with torch.no_grad():
        term = contrast(model.eval(), batch, temperature)
        plain = float(build_objective(hyper("cross_entropy"))(model.train(), batch, CPU))
    found = objective(model.train(), batch, CPU)
    assert float(found.detach()) == pytest.approx(plain + weight * term * batch.n_labels, rel=1e-4)
    found.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.connector.parameters())


def test_words_of_patches_are_no_part_of_a_caption(model):
    """They are learned, but the contrast is of what the caption says."""
    plain, told = captions(model.config), captions(model.config)
    told.inputs["labels"][:, 1:4] = torch.tensor([7, 8, 9])
    terms = []
    for batch in (plain, told):
        losses = []
        for weight in (0.0, 1.0):
            objective = build_objective(hyper("contrastive", contrastive_weight=weight))
            objective.prepare(model, None, CPU)
            losses.append(float(objective(model.train(), batch, CPU).detach()))
        terms.append(losses[1] - losses[0])
    assert terms[1] == pytest.approx(terms[0], rel=1e-4)


@torch.no_grad()
def test_contrastive_leaves_batches_alone_that_are_no_pairs(model):
    objective = build_objective(hyper("contrastive"))
    objective.prepare(model, None, CPU)
    plain = build_objective(hyper("cross_entropy"))
    single = captions(model.config, (4,))
    text = captions(model.config)
    del text.inputs["pixel_values"]
    text.inputs["input_ids"][text.inputs["input_ids"] == model.config.image_token_id] = 5
    two_and_none = captions(model.config, (9, 9))
    pictures = two_and_none.inputs["input_ids"] == model.config.image_token_id
    two_and_none.inputs["input_ids"][pictures] = 5
    two_and_none.inputs["input_ids"][0, : 2 * model.config.num_image_tokens] = (
        model.config.image_token_id
    )
    for batch in (single, text, two_and_none):
        values = [float(o(model.train(), batch, CPU)) for o in (objective, plain)]
        assert values[0] == pytest.approx(values[1])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="contrastive_temperature is 0"):
        hyper("contrastive", contrastive_temperature=0.0)
    with pytest.raises(UserError, match="contrastive_weight is -1"):
        hyper("contrastive", contrastive_weight=-1.0)


@pytest.fixture
def config():
    return tiny_config()


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return VLMambaForConditionalGeneration(config)
