"""The model of a point and what it is given: built, compiled where asked, with its inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.speed import models
from harness.speed.sweep.points import Point
from vlmamba.models.vlm import VLMambaForConditionalGeneration

WARM_UP_TOKENS, WARM_UP_STEPS = 32, 2


@dataclass(frozen=True)
class Subject:
    """A model and the two calls that are timed.

    prefill: (B, L, D) -> logits (B, V) and a cache.  step: tokens (B,) and the cache -> logits.
    """

    model: VLMambaForConditionalGeneration
    prefill: Callable[[Tensor], tuple[Tensor, Any]]
    step: Callable[[Tensor, Any], Tensor]


def load(point: Point) -> Subject:
    """The model, compiled where the sweep asks for it: the same two functions of every model."""
    settings = point.settings
    torch.set_num_threads(settings.threads)
    model = models.build(
        point.model,
        image_tokens=settings.image_tokens or 1,
        tiny=settings.tiny,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
        weights=point.quantize,
    )
    prefill, step = models.prefill, models.step
    if settings.compile:
        prefill, step = torch.compile(prefill), torch.compile(step)
    return Subject(model, functools.partial(prefill, model), functools.partial(step, model))


def inputs(subject: Subject, point: Point, seq_len: int) -> tuple[Tensor, Tensor | None]:
    """(input_ids (B, T), image features (B, P, Dv) or None) of `seq_len` tokens together."""
    generator = torch.Generator().manual_seed(0)
    image_tokens = point.image_tokens if point.image_tokens < seq_len else 0
    shape = (point.batch_size, seq_len - image_tokens)
    ids = torch.randint(1000, shape, generator=generator).to(point.settings.device)
    if not image_tokens:
        return ids, None
    config = subject.model.config
    patches = point.batch_size, config.num_patches, config.vision_width
    features = torch.randn(patches, generator=generator)
    return ids, features.to(subject.model.device, subject.model.dtype)


def warm_up(subject: Subject, point: Point) -> None:
    """Kernels built, threads started: a short prompt and two steps, through the same calls."""
    tokens = min(point.seq_len, point.image_tokens + WARM_UP_TOKENS)
    ids, features = inputs(subject, point, tokens)
    logits, cache = subject.prefill(models.embed(subject.model, ids, features))
    for _ in range(WARM_UP_STEPS):
        logits = subject.step(logits.argmax(-1), cache)
