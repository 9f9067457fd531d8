"""Objective distill against its equation, computed in numpy; teachers that do not fit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_config

from vlmamba.data.collate import collate
from vlmamba.data.examples import Example
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.training.recipe import Hyperparameters, build_objective, hyperparameters
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE

CPU = torch.device("cpu")


@pytest.fixture
def teacher(model, processor, tmp_path):
    """Another model of the same shape, and where it is saved."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.language_model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    return other, str(tmp_path / "teacher")


def hyper(folder: str | None, objective: str = "distill", **changes: float) -> Hyperparameters:
    sizes = {"lr": 1e-3, "batch_size": 2, "micro_batch": 2, "dtype": "fp32"}
    return Hyperparameters.from_flat(
        {**sizes, "objective": objective, "teacher": folder, **changes}
    )


@pytest.fixture
def batch(config):
    """Two rows of different length, the first with an image; some tokens are supervised."""
    images = torch.rand(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    first = torch.tensor([config.image_token_id] * config.num_image_tokens + [5, 6, 7, 8, 9])
    second = torch.tensor([11, 12, 13, 14])
    labels = first.clone()
    labels[: config.num_image_tokens + 2] = IGNORE
    return collate(
        [
            Example(first, labels, images),
            Example(second, torch.tensor([IGNORE, IGNORE, 13, 14])),
        ],
        pad_token_id=0,
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits - logits.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


def expected(student, teacher, batch, a: float, b: float, t: float) -> float:
    """The sum over supervised tokens, one at a time."""
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "labels"}
    labels, total = batch.inputs["labels"].numpy(), 0.0
    with torch.no_grad():
        outs = [m.eval()(**inputs, output_hidden_states=True) for m in (student, teacher)]
    logits = [out.logits.double().numpy() for out in outs]
    hidden = [out.hidden_states[-1].double().numpy() for out in outs]
    for row in range(labels.shape[0]):
        for place in range(1, labels.shape[1]):
            label = labels[row, place]
            if label == IGNORE:
                continue
            s, h = (x[row, place - 1] for x in logits), [x[row, place - 1] for x in hidden]
            own, its = s
            total -= log_softmax(own)[label]
            p, q = log_softmax(its / t), log_softmax(own / t)
            total += a * t**2 * float((np.exp(p) * (p - q)).sum())
            cosine = h[0] @ h[1] / (np.linalg.norm(h[0]) * np.linalg.norm(h[1]))
            total += b * (1 - cosine)
    return total


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.7), (0.0, 1.0, 1.0), (2.0, 0, 3)]
)
def test_the_loss_is_the_equation(model, processor, teacher, batch, weights):
    a, b, t = map(float, weights)
    other, folder = teacher
    chosen = hyper(folder, distill_logits=a, distill_features=b, distill_temperature=t)
    objective = build_objective(chosen)
    objective.prepare(model, processor, CPU)
    found = float(objective(model.train(), batch, CPU).detach())
    assert found == pytest.approx(expected(model, other, batch, a, b, t), rel=1e-5)


@pytest.mark.parametrize("wider", ["teacher", "student"])
@pytest.mark.parametrize("top", [None, 300])
def test_rows_that_pad_a_vocabulary_stand_for_no_token(
    wider, top, model, processor, teacher, batch, tmp_path
):
    """Mamba-2's is padded to another multiple than Mamba's, of the same tokenizer."""
    other, folder = teacher
    padded = other if wider == "teacher" else model
    count = padded.config.text_config.vocab_size
    weights = {name: weight.clone() for name, weight in padded.state_dict().items()}
    padded.resize_token_embeddings(count + 8)
    other.save_pretrained(folder)
    found = []
    for student in (model, copy.deepcopy(model)):
        objective = build_objective(hyper(folder, distill_top=top))
        objective.prepare(student, processor, CPU)
        found.append(float(objective(student.train(), batch, CPU).detach()))
    assert found[0] == found[1] and np.isfinite(found[0])
    if top is None:
        padded.resize_token_embeddings(count)
        padded.load_state_dict(weights)
        plain = build_objective(hyper(None, objective="cross_entropy"))
        cross = [float(plain(m.train(), batch, CPU).detach()) for m in (student, model)]
        rest = expected(model, other, batch, 1.0, 1.0, 1.0) - cross[1]
        assert found[0] - cross[0] == pytest.approx(rest, rel=1e-4)


def test_cached_features_of_another_layer_are_not_a_teachers(model, processor, teacher, batch):
    model.config.vision_feature_layer = -1
    objective = build_objective(hyper(teacher[1]))
    objective.prepare(model, processor, CPU)
    batch.inputs["image_features"] = batch.inputs.pop("pixel_values")
    with pytest.raises(UserError, match="reads another layer of the encoder"):
        objective._ask(batch.inputs, batch.inputs)


def test_only_the_student_gets_gradients(model, processor, teacher, batch):
    objective = build_objective(hyper(teacher[1]))
    objective.prepare(model, processor, CPU)
    objective(model.train(), batch, CPU).backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert not objective.teacher.training
    assert any(p.grad is not None for p in model.language_model.parameters())


def test_a_student_that_is_its_teacher_learns_nothing_more(model, processor, batch, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    objective = build_objective(hyper(str(tmp_path)))
    objective.prepare(model, processor, CPU)
    plain = build_objective(hyper(None, objective="cross_entropy"))
    model.train()
    difference = float((objective(model, batch, CPU) - plain(model, batch, CPU)).detach())
    assert difference == pytest.approx(0, abs=1e-4)


def test_a_batch_without_labels_teaches_nothing(model, processor, teacher, batch):
    objective = build_objective(hyper(teacher[1]))
    objective.prepare(model, processor, CPU)
    batch.inputs["labels"].fill_(IGNORE)
    batch.n_labels = 0
    assert float(objective(model.train(), batch, CPU).detach()) == 0


def test_teachers_that_do_not_fit_are_refused(model, processor, tokenizer, teacher, tmp_path):
    config = tiny_config(d_model=48)
    wide = VLMambaForConditionalGeneration(config)
    of_wide = VLMambaProcessor.from_config(config, tokenizer)
    objective = build_objective(hyper(teacher[1]))
    with pytest.raises(UserError, match="--distill-features 0"):
        objective.prepare(wide, of_wide, CPU)
    build_objective(hyper(teacher[1], distill_features=0.0)).prepare(wide, of_wide, CPU)
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(UserError, match="another tokenizer"):
        objective.prepare(model, other, CPU)
    with pytest.raises(UserError, match="belong together"):
        hyper(None)
    table = {"lr": 1e-3, "batch_size": 2, "micro_batch": 2}
    with pytest.raises(UserError, match="--teacher belongs to --objective distill; the objective"):
        hyperparameters({"finetune": table}, "finetune", {"teacher": "nano"})
    with pytest.raises(UserError, match=r"teacher in \[finetune\] belongs to --objective distill"):
        hyperparameters({"finetune": table | {"teacher": "nano"}}, "finetune", {})
    with pytest.raises(UserError, match="distill_temperature is 0"):
        hyper("nano", distill_temperature=0.0)
