"""transformers' Trainer on our model: accumulation changes nothing, evaluate and predict work."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from vlmamba.checkpoints import load

STEPS, BATCH = 20, 8
LENGTH = 84


class Samples(torch.utils.data.Dataset):
    """A picture's features, its tokens, words, and answers of 1 to 20 tokens."""

    def __init__(self, config, count: int):
        self.config, self.count = config, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(n)
        patches = self.config.num_image_tokens
        ids = torch.randint(2, 300, (LENGTH,), generator=rng)
        ids[5 : 5 + patches] = self.config.image_token_id
        labels = torch.full((LENGTH,), -100)
        labels[-(1 + n * 7 % 20) :] = ids[-(1 + n * 7 % 20) :]
        width = self.config.vision_config.hidden_size
        features = torch.randn(patches, width, generator=rng)
        return {"input_ids": ids, "labels": labels, "image_features": features}


def trainer(model, tmp_path, per_step: int, **options) -> Trainer:
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=per_step,
        gradient_accumulation_steps=BATCH // per_step,
        per_device_eval_batch_size=3,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        learning_rate=1e-4,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    samples = Samples(model.config, STEPS * BATCH)
    return Trainer(
        model, arguments, train_dataset=samples, eval_dataset=Samples(model.config, 5), **options
    )


def losses(run: Trainer) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["tiny", pytest.param("nano", marks=pytest.mark.soak)])
def test_accumulation_gives_the_same_losses(name, model, tmp_path):
    """20 steps at 8 x 1, 2 x 4 and 1 x 8 (rows x parts), answers of unequal length."""
    curves = {}
    for size in (1, 4, 8):
        start = load("nano")[0] if name == "nano" else copy.deepcopy(model)
        curves[size] = losses(trainer(start, tmp_path, BATCH // size))
    for size, curve in curves.items():
        assert len(curve) == STEPS
        assert np.allclose(curve, curves[1], rtol=0, atol=1e-5), size
    assert curves[1][-1] != curves[1][0]


def right(prediction: EvalPrediction) -> dict[str, float]:
    guesses, truth = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
    known = truth != -100
    return {"accuracy": float((guesses == truth)[known].mean())}


def test_evaluate_and_predict_give_metrics(model, tmp_path):
    run = trainer(model, tmp_path, BATCH, compute_metrics=right)
    metrics = run.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1
    prediction = run.predict(run.eval_dataset)
    assert prediction.predictions.shape == (5, LENGTH, model.config.vocab_size)
    whole = run.data_collator([run.eval_dataset[n] for n in range(5)])
    with torch.no_grad():
        output = run.model.eval()(**whole)
    assert np.allclose(prediction.predictions, output.logits, atol=1e-3)
    assert metrics["eval_loss"] == pytest.approx(prediction.metrics["test_loss"], abs=1e-6)


def test_the_loss_is_divided_by_the_items_of_the_whole_batch(model):
    ids = torch.randint(2, 300, (4, 9))
    labels = ids.clone()
    labels[0, :7], labels[1, :3], labels[3] = -100, -100, -100
    items = (labels[:, 1:] != -100).sum()
    for training in (False, True):
        model.train(training)
        whole = model(ids, labels=labels).loss
        for number in (items, int(items)):
            parts = [
                model(ids[n : n + 1], labels=labels[n : n + 1], num_items_in_batch=number).loss
                for n in range(4)
            ]
            assert torch.allclose(sum(parts), whole, atol=1e-5)
            assert parts[3] == 0  # no label in this part
