"""What a stage costs before it runs: parameters, FLOPs per step, memory per device.

    python -m vlmamba.train --preset 2.8b-slimpj+siglip-so400m-384 --stage finetune \\
        --estimate --devices 8

Parameters are counted on the model itself, built on the meta device (no memory).  FLOPs and
memory are bounds for sequences of `max_length` tokens, one image each: a multiply-add is two
FLOPs; a backward pass costs twice the forward, or once where the weights are frozen; gradient
checkpointing adds one forward.  Memory is weights, gradients, AdamW's moments and what the
backward pass keeps; allocator and communication buffers come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmamba.config import VLMambaConfig
from vlmamba.models.mixer import Mixer
from vlmamba.models.scan2d import scan_orders
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import lora
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import Stage, freeze

PARTS = ("vision_encoder", "connector", "language_model")


@dataclass(frozen=True)
class Estimate:
    """Parameters by part, FLOPs per update over all devices, bytes per device."""

    parameters: dict[str, int]
    learning: dict[str, int]
    flops_per_step: float
    tokens_per_step: int
    state_bytes: int  # weights, gradients, moments of one full copy
    activation_bytes: int  # of one micro-batch

    def bytes_per_device(self, devices: int, sharded: bool) -> int:
        """DDP keeps a full copy on each device; FSDP shards the state."""
        return self.state_bytes // (devices if sharded else 1) + self.activation_bytes


def estimate(config: VLMambaConfig, stage: Stage, hyper: Hyperparameters) -> Estimate:
    """Bounds for one update of `stage`."""
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(config)
    freeze(model, stage)
    mixer = cast(Mixer, model.get_submodule("language_model.layers.0.mixer"))
    layer_flops = _layer_flops(mixer)
    parameters = {part: _count(model.get_submodule(part)) for part in PARTS}
    if hyper.lora:
        lora.attach(model, hyper)
    learning = {part: _count(model.get_submodule(part), learning=True) for part in PARTS}
    has_images = stage.template is not None
    text = hyper.max_length - (config.num_image_tokens if has_images else 0)
    sample = _language_flops(config, layer_flops, max(1, text), stage, hyper)
    if has_images:
        sample += _vision_flops(model, config) + _connector_flops(model, config)
    return Estimate(
        parameters,
        learning,
        flops_per_step=sample * hyper.batch_size,
        tokens_per_step=hyper.max_length * hyper.batch_size,
        state_bytes=4 * sum(parameters.values()) + 12 * sum(learning.values()),
        activation_bytes=hyper.micro_batch * _activation_bytes(config, mixer, text, hyper),
    )


def _count(module: nn.Module, learning: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)


def _layer_flops(mixer: Mixer) -> int:
    """Forward of one token through a layer; A_log is a matrix of no product."""
    named = mixer.named_parameters()
    matrices = sum(p.numel() for name, p in named if p.ndim >= 2 and name != "A_log")
    return 2 * matrices + mixer.scan_flops()


def _language_flops(
    config: VLMambaConfig, layer_flops: int, labels: int, stage: Stage, hyper: Hyperparameters
) -> float:
    """Forward and backward of one sequence through the language model and its head."""
    forward = config.n_layer * hyper.max_length * layer_flops
    d = config.d_model
    head = 2 * labels * d * config.vocab_size
    backward = 2 if "language_model" in stage.learns and not hyper.lora else 1
    again = 1 if hyper.gradient_checkpointing else 0
    return forward * (1 + backward + again) + head * (1 + backward)


def _connector_flops(model: VLMambaForConditionalGeneration, config: VLMambaConfig) -> float:
    """Forward and backward of one image; the scanned layer runs once per direction."""
    scanned = sum(p.numel() for n, p in model.connector.named_parameters() if "vss." in n)
    directions = len(scan_orders(config.scan, *config.grid)[0])
    repeats = directions if config.scan_shared else 1  # unshared: each direction has its own
    once = _count(model.connector) - scanned
    return 3 * 2 * config.num_image_tokens * (once + repeats * scanned)


def _vision_flops(model: VLMambaForConditionalGeneration, config: VLMambaConfig) -> float:
    """Forward of one image, counted by running the encoder on the meta device."""
    side = config.vision_config.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_encoder.eval()(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops()


def _activation_bytes(
    config: VLMambaConfig, mixer: Mixer, labels: int, hyper: Hyperparameters
) -> int:
    """What the backward pass keeps of one sequence: per layer the float32 residual, its norm and
    what the mixer keeps, and what it makes again of the layer at work; with checkpointing the
    residual of every layer and one layer's rest."""
    element = 2 if hyper.dtype == "bf16" else 4
    d, length = config.d_model, hyper.max_length
    kept, at_work = (length * kept for kept in mixer.kept_bytes(element))
    residual = 4 * d * length
    layer = residual + (4 + element) * d * length + kept
    logits = 2 * 4 * labels * config.vocab_size
    if hyper.gradient_checkpointing:
        return config.n_layer * residual + layer + at_work + logits
    return config.n_layer * layer + at_work + logits


def table(found: Estimate, hyper: Hyperparameters, devices: int) -> str:
    """The estimate as lines of text."""
    gib = 2**30
    lines = [f"{'part':<16}{'parameters':>16}{'learning':>16}"]
    lines += [f"{p:<16}{found.parameters[p]:>16,}{found.learning[p]:>16,}" for p in PARTS]
    total, learning = sum(found.parameters.values()), sum(found.learning.values())
    ddp, fsdp = (found.bytes_per_device(devices, sharded) / gib for sharded in (False, True))
    rounds = -(-hyper.batch_size // (devices * hyper.micro_batch))
    lines += [
        f"{'total':<16}{total:>16,}{learning:>16,}",
        "",
        f"update: {hyper.batch_size} sequences of at most {hyper.max_length} tokens on {devices} "
        f"device(s): {rounds} micro-batch(es) of {hyper.micro_batch} each",
        f"compute: {found.flops_per_step:.3g} FLOPs per update, "
        f"{found.flops_per_step / found.tokens_per_step:.3g} per token",
        f"memory per device, {hyper.dtype}, gradient checkpointing "
        f"{'on' if hyper.gradient_checkpointing else 'off'}: "
        f"state {found.state_bytes / gib:.1f} GiB, activations "
        f"{found.activation_bytes / gib:.1f} GiB; together {ddp:.1f} GiB with DDP, "
        f"{fsdp:.1f} GiB with FSDP",
    ]
    return "\n".join(lines)
