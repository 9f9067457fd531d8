"""Do answers depend on which questions are answered together? They must not.

The demo benchmarks are answered at several batch sizes and in shuffled order, in float32, bfloat16
and with weights of whole numbers; every answer must be the same string, within each of these. How
many differ from float32's is told too. The model is the bundled demo, or random weights of its
shape where it is absent.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

import tasks
from harness.data.images import decode, image_key
from harness.data.sources import Source
from harness.speed.throughput import word_tokenizer
from tasks.common import Benchmark
from vlmamba import checkpoints
from vlmamba.config import VLMambaConfig
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.quantized import KINDS, quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import SYSTEM, VLMambaProcessor
from vlmamba_core.errors import UserError

BATCH_SIZES = (1, 3, 8, 32)
NUMBERS = ("float32", "bfloat16", "int8", "int4")  # what the language model computes with
QUICK_TASKS = ("pope", "mme")
QUICK_QUESTIONS, QUESTIONS = 36, 200  # of each task
NEW_TOKENS = 16
LOGITS_BATCH = 8


@dataclass(frozen=True)
class Agreement:
    """Of one kind of numbers: answers that depend on their batch, and that are not float32's."""

    different: int
    from_float32: int


@dataclass(frozen=True)
class Invariance:
    """What was asked, and whether the answers agreed.

    different: answers in float32 that depend on their batch; others: by kind of numbers, float32
    aside.  logits_error: largest difference of a padded batch's logits from each question's alone,
    over the largest logit.
    """

    model: str
    tasks: tuple[str, ...]
    questions: int
    different: int
    logits_error: float
    others: Mapping[str, Agreement] = field(default_factory=dict)


@torch.inference_mode()
def measure(names: Sequence[str], questions: int) -> Invariance:
    """Answer the first `questions` rows of each task at every batch size and shuffled."""
    asked = [item for name in names for item in _rows(tasks.load(name), questions)]
    questions_ = [text for text, _, _ in asked]
    name, model, processor = _model(questions_)
    requests = [_request(processor, *item) for item in asked]
    first, different = _answers(GroupedGenerator(model, processor), requests)
    with_image = [request for request in requests if request.image is not None]
    error = _logits_error(model, processor, with_image[:LOGITS_BATCH])
    others = {}
    for kind in NUMBERS[1:]:
        _, model, _ = _model(questions_, kind)
        answers, own = _answers(GroupedGenerator(model, processor), requests)
        others[kind] = Agreement(own, sum(a != b for a, b in zip(answers, first, strict=True)))
    return Invariance(name, tuple(names), len(requests), different, error, others)


def _answers(generator: GroupedGenerator, requests: Sequence[Request]) -> tuple[list[str], int]:
    """The answers one at a time, and how many of them are others in another batch or order."""
    first, *others = (generator.generate(requests, NEW_TOKENS, size) for size in BATCH_SIZES)
    others.append(_shuffled(generator, requests))
    different = sum(any(answers[n] != first[n] for answers in others) for n in range(len(first)))
    return first, different


def _rows(task: Benchmark, limit: int) -> list[tuple]:
    """(question, image or None, image key) of the demo's first rows."""
    rows = Source.parse("demo").load(task, "paper")
    found = []
    for row in rows.select(range(min(limit, len(rows)))):
        stored = row.get(task.image_column)
        image = None if stored is None else decode(stored)
        key = None if stored is None else image_key(stored)
        found.append((task.prompt(row, "paper"), image, key))
    return found


def _model(
    questions: Sequence[str], numbers: str = "float32"
) -> tuple[str, VLMambaForConditionalGeneration, VLMambaProcessor]:
    """(name, model, processor): the demo, or random weights that give varied answers."""
    name = "nano"
    try:
        model, processor = checkpoints.load("nano", dtype=torch.float32)
    except UserError:
        name = "random weights"
        torch.manual_seed(0)
        config = VLMambaConfig.preset("nano")
        tokenizer = word_tokenizer([SYSTEM, "USER: ASSISTANT:", *questions])
        processor = VLMambaProcessor.from_config(config, tokenizer)
        model = VLMambaForConditionalGeneration(config).eval()
        model.vision_encoder.load_pretrained()
    if numbers in KINDS:
        quantize(model.language_model, numbers)
    elif numbers != "float32":
        cast(Any, model).to(getattr(torch, numbers))
    return name, model, processor


def _request(processor: VLMambaProcessor, question: str, image, key: str | None) -> Request:
    images = 0 if image is None else 1
    return Request(processor.conversation_prompt(question, images), key, image)


def _shuffled(generator: GroupedGenerator, requests: Sequence[Request]) -> list[str]:
    order = random.Random(0).sample(range(len(requests)), len(requests))
    answers = generator.generate([requests[n] for n in order], NEW_TOKENS, BATCH_SIZES[-1])
    return [answer for _, answer in sorted(zip(order, answers, strict=True))]


def _logits_error(
    model: VLMambaForConditionalGeneration,
    processor: VLMambaProcessor,
    requests: Sequence[Request],
) -> float:
    def logits(batch: Sequence[Request]) -> torch.Tensor:
        inputs = processor(
            text=[request.prompt for request in batch],
            images=[[request.image] for request in batch],
            return_tensors="pt",
            padding=True,
        )
        return model(**inputs, logits_to_keep=1).logits[:, 0]

    together = logits(requests)
    alone = torch.cat([logits([request]) for request in requests])
    return float((together - alone).abs().max() / alone.abs().max())
