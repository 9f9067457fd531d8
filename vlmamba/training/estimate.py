"""What a stage costs before it runs: parameters, FLOPs per step, memory per device.

    python -m vlmamba.train --preset 2.8b-slimpj+siglip-so400m-384 --stage finetune \\
        --estimate --devices 8

Parameters are counted on the model itself, built on the meta device (no memory).  FLOPs and
memory are bounds for sequences of `max_length` tokens, one image each (as many tiles as its layout
may give): a multiply-add is two FLOPs; a backward pass costs twice the forward, or once where the
weights are frozen; gradient checkpointing adds one forward.  Memory is the highest of an update's
moments: weights and AdamW's moments are always there; what the backward pass keeps is at its most
where the loss is made, when gradients exist only if another micro-batch came before; all gradients
exist at the end.  Allocator and communication buffers come on top, on a CPU some 1 GiB of Python
and its libraries.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmamba.config import VLMambaConfig
from vlmamba.models.low_rank import packed_layers
from vlmamba.models.quantized import count_parameters
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import lora
from vlmamba.training.recipe import Hyperparameters
from vlmamba.training.stages import Stage, freeze

PARTS = ("vision_encoder", "connector", "language_model")


@dataclass(frozen=True)
class Estimate:
    """Parameters by part, FLOPs per update over all devices, bytes per device."""

    parameters: dict[str, int]
    trainable: dict[str, int]
    flops_per_step: float
    tokens_per_step: int
    packed: tuple[int, int]  # weights that are whole numbers, and their bytes
    at_once: tuple[int, int]  # sequences of an update, and of a micro-batch
    activation_bytes: int  # at most, of one micro-batch
    last_bytes: int  # beside all gradients, at the end of the backward pass

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and moments of one full copy, float32 where they are not packed."""
        numbers, packed_bytes = self.packed
        wide = 4 * (sum(self.parameters.values()) - numbers)
        return wide + packed_bytes + 12 * sum(self.trainable.values())

    def bytes_per_device(self, devices: int, sharded: bool) -> int:
        """DDP keeps a full copy on each device; FSDP shards the state."""
        batch_size, micro_batch = self.at_once
        gradients = 4 * sum(self.trainable.values())
        accumulates = batch_size > devices * micro_batch
        shards = devices if sharded else 1
        at_loss = self.activation_bytes + (gradients // shards if accumulates else 0)
        at_end = gradients // shards + self.last_bytes
        return (self.state_bytes - gradients) // shards + max(at_loss, at_end)


def estimate(
    config: VLMambaConfig, stage: Stage, hyper: Hyperparameters, tiles: int = 1
) -> Estimate:
    """Bounds for one update of `stage`; tiles: of an image, at most."""
    with torch.device("meta"):
        model = VLMambaForConditionalGeneration(deepcopy(config))  # LoRA may write into it
    freeze(model, stage)
    lora.check_packed(model, hyper)
    parameters = {part: count_parameters(model.get_submodule(part)) for part in PARTS}
    if hyper.lora:
        lora.attach(model, hyper)
    if hyper.gradient_checkpointing:
        model.activation_checkpointing_enable()
    trainable = {part: _trainable(model.get_submodule(part)) for part in PARTS}
    has_images = stage.template is not None
    text = hyper.max_length - (tiles * config.num_image_tokens if has_images else 0)
    sample = _language_flops(model, max(1, text), stage, hyper)
    if has_images:
        sample += tiles * (_vision_flops(model, config) + 3 * model.connector.flops())
    return Estimate(
        parameters,
        trainable,
        flops_per_step=sample * hyper.batch_size,
        tokens_per_step=hyper.max_length * hyper.batch_size,
        packed=_packed(model),
        at_once=(hyper.batch_size, hyper.micro_batch),
        activation_bytes=_activation_bytes(model, text if has_images else None, hyper, tiles),
        # the tied embedding's gradient comes from the head and from the input, then both are added
        last_bytes=_tied_bytes(model),
    )


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _packed(module: nn.Module) -> tuple[int, int]:
    """Weights that are whole numbers, and their bytes with those of the scales."""
    layers = packed_layers(module)
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    return numbers, sum(b.nbytes for layer in layers for b in layer.buffers(recurse=False))


def _language_flops(
    model: VLMambaForConditionalGeneration, labels: int, stage: Stage, hyper: Hyperparameters
) -> float:
    """Forward and backward of one sequence through the language model and its head."""
    forward = model.language_model.flops(hyper.max_length)
    head = 2 * labels * model.config.d_model * model.config.vocab_size
    backward = 2 if "language_model" in stage.trainable and not hyper.lora else 1
    again = 1 if hyper.gradient_checkpointing else 0
    heads = [owner.get_submodule("lm_head") for owner in model.language_model.heads]
    learns = any(p.requires_grad for part in heads for p in part.parameters())
    return forward * (1 + backward + again) + head * (3 if learns else 2)


def _vision_flops(model: VLMambaForConditionalGeneration, config: VLMambaConfig) -> float:
    """Forward of one tile, counted by running the encoder on the meta device."""
    pixels = torch.empty(1, *config.vision_encoder.pixels(config.vision_config), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.vision_encoder.eval()(pixels)
    return counter.get_total_flops()


def _activation_bytes(
    model: VLMambaForConditionalGeneration, text: int | None, hyper: Hyperparameters, tiles: int
) -> int:
    """The most that one micro-batch holds beside weights, moments and gradients.

    text: tokens of a sequence besides its image; None: no image, all are text.  Three moments
    compete: the encoder at work, before anything is kept; the loss, when all is kept; the last
    layer's backward pass.
    """
    config, rows = model.config, hyper.micro_batch
    dtype = torch.bfloat16 if hyper.dtype == "bf16" else torch.float32
    element = dtype.itemsize
    labels = hyper.max_length if text is None else max(1, text)
    language = model.language_model.activation_bytes(rows, hyper.max_length, dtype)
    connector = encoder = 0
    if text is not None:
        connector = rows * tiles * model.connector.activation_bytes(element)
        encoder = rows * tiles * config.vision_encoder.working_bytes(config.vision_config)
    # float32: logits and their log-softmax, then that and the gradients of both
    loss = rows * labels * config.vocab_size
    head = element % 4 * config.d_model * config.vocab_size  # autocast's copy
    at_loss = head + max(language.forward + (8 + element % 4) * loss, language.kept + 12 * loss)
    return max(encoder, connector + max(at_loss, language.backward + _tied_bytes(model)))


def _tied_bytes(model: VLMambaForConditionalGeneration) -> int:
    """A gradient of the embedding where it is the output head too."""
    weight = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is weight
    return 4 * weight.numel() if weight.requires_grad and tied else 0


def table(found: Estimate, hyper: Hyperparameters, devices: int) -> str:
    """The estimate as lines of text."""
    gib = 2**30
    lines = [f"{'part':<16}{'parameters':>16}{'trainable':>16}"]
    lines += [f"{p:<16}{found.parameters[p]:>16,}{found.trainable[p]:>16,}" for p in PARTS]
    total, trainable = sum(found.parameters.values()), sum(found.trainable.values())
    ddp, fsdp = (found.bytes_per_device(devices, sharded) / gib for sharded in (False, True))
    rounds = -(-hyper.batch_size // (devices * hyper.micro_batch))
    lines += [
        f"{'total':<16}{total:>16,}{trainable:>16,}",
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
