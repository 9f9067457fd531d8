"""Nothing that does not learn gets a graph: frozen parts are neither kept nor gone back through."""

from __future__ import annotations

import pytest
import torch
from test_training import accelerator, data, images, make_run  # noqa: F401

from vlmamba.training import loop
from vlmamba.training.stages import STAGES, freeze


def graphs(module: torch.nn.Module) -> tuple[list[str], list]:
    """Names of submodules whose output had a graph, filled while it runs; and the hooks."""
    found: list[str] = []

    def look(name: str):
        def hook(_module, _inputs, output) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                found.append(name)

        return hook

    return found, [part.register_forward_hook(look(name)) for name, part in module.named_modules()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("lora", [None, 2])
def test_what_does_not_learn_gets_no_graph_in_training(stage, checkpointing, lora, make_run):  # noqa: F811
    if lora and stage == "pretrain":
        pytest.skip("LoRA is for stages in which the language model learns")
    run = make_run(stage, steps=2, gradient_checkpointing=checkpointing, lora=lora)
    seen: dict[str, list[str]] = {}

    class Watched(loop.StepLog):
        def __init__(self, *args):
            super().__init__(*args)  # here checkpointing has been switched on
            model = run.model
            seen["encoder"], _ = graphs(model.vision_encoder)
            seen["embedding"], _ = graphs(model.language_model.embedding)
            seen["connector"], _ = graphs(model.connector)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "StepLog", Watched)
        loop.train(run, accelerator())
    assert seen["connector"]  # the watch works
    assert seen["encoder"] == []
    trainable = run.model.language_model.embedding.weight.requires_grad
    assert bool(seen["embedding"]) == trainable == (stage == "finetune" and not lora)


def encoded(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return model.encode_images(pixels)


def test_a_frozen_encoder_gets_no_graph_in_anyones_loop(model):
    """As transformers' Trainer leaves the model: all in training mode, inputs asked for graphs."""
    freeze(model, STAGES["pretrain"])
    model.train()
    model.activation_checkpointing_enable()
    pixels = torch.randn(1, 3, 28, 28)
    assert not encoded(model, pixels).requires_grad
    model.vision_encoder.requires_grad_(True)  # who lets it learn gets gradients
    encoded(model, pixels).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.vision_encoder.parameters())


def test_a_frozen_encoder_still_tells_how_pixels_matter(model):
    model.requires_grad_(False)
    pixels = torch.randn(1, 3, 28, 28, requires_grad=True)
    encoded(model, pixels).square().sum().backward()
    assert pixels.grad.any()
