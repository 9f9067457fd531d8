"""Prefill and decode of a 130M-shaped Mamba: ours, transformers' with the same weights, and
transformers of about that size with their key-value cache.

Batch 1. A prompt of 1024 tokens; 32 generated tokens, greedy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.speed.baselines import OurVLM, TransformersVLM, VLMBase, build
from harness.speed.machine import Machine
from harness.speed.timing import OURS, Comparison, Contender, Effort, side_by_side
from vlmamba.generation import greedy
from vlmamba.models.language import LanguageModel

SIZE = "130m"
PROMPT_TOKENS = 1024
NEW_TOKENS = 32
TRANSFORMERS = "transformers Mamba"
OURS_GENERATE = "ours, generate()"
TRANSFORMERS_GENERATE = "transformers Mamba, generate()"
ATTENTION = ("pythia-160m", "llama-160m")
NEVER = -1  # an end token that no model writes


@dataclass
class Models:
    """The models of a run, each built when first needed; ours and transformers' share weights."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    built: dict[str, VLMBase] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        if name not in self.built:
            model = build(name, dtype=self.dtype, device=self.device)
            if name == f"transformers-mamba-{SIZE}":
                share_weights(self.ours, cast(TransformersVLM, model))
            _never_end(model)
            self.built[name] = model
        return self.built[name]

    @property
    def ours(self) -> OurVLM:
        """The model under test."""
        return self[f"vl-mamba-{SIZE}"]

    @property
    def theirs(self) -> TransformersVLM:
        """transformers' Mamba with the weights of `ours`."""
        return self[f"transformers-mamba-{SIZE}"]


def share_weights(ours: OurVLM, theirs: TransformersVLM) -> None:
    """Copy our parameters into transformers' Mamba."""
    renamed = {
        "backbone." + name.replace("embedding.", "embeddings."): value
        for name, value in ours.language_model.state_dict().items()
        if not name.startswith("lm_head.")
    }
    renamed["lm_head.weight"] = ours.embedding.weight
    theirs.language_model.load_state_dict(renamed)
    theirs.language_model.tie_weights()
    theirs.embedding, theirs.connector = (
        cast(nn.Embedding, theirs.language_model.get_input_embeddings()),
        ours.connector,
    )


def _never_end(model: VLMBase) -> None:
    """Every answer is as long as it may be."""
    inner = cast(
        PreTrainedModel, model.model if isinstance(model, OurVLM) else model.language_model
    )
    inner.config.eos_token_id = NEVER
    inner.generation_config.eos_token_id = None


@torch.inference_mode()
def prefill(models: Models, effort: Effort, machine: Machine) -> Comparison:
    """From the prompt's embeddings to the logits after its last token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (1, PROMPT_TOKENS), generator=generator).to(models.device)
    contenders = {name: Contender(_prefill(m, ids)) for name, m in _all(models).items()}
    flops = prefill_flops(models.ours.language_model, PROMPT_TOKENS)
    return Comparison(
        "prefill",
        f"batch 1, {PROMPT_TOKENS} tokens",
        "run",
        side_by_side(contenders, effort, models.device),
        machine.prefill_floor_s(flops),
    )


def _prefill(model: VLMBase, ids: Tensor) -> Callable[[], object]:
    return lambda: model.prefill(model.embed(ids))


def prefill_flops(language_model: LanguageModel, tokens: int) -> float:
    """Multiplications and additions of the matrix products, the head's at the last token only."""
    linear = [m for m in language_model.modules() if isinstance(m, nn.Linear)]
    layers = sum(m.weight.numel() for m in linear if m is not language_model.lm_head)
    return 2.0 * (tokens * layers + language_model.embedding.weight.numel())


@torch.inference_mode()
def decode(models: Models, effort: Effort) -> Comparison:
    """Seconds for a token after the prompt; transformers with attention hold 1024 in their cache.

    generate() starts from one token, so that it is generation that is timed. Attention models run
    a bare loop over their forward pass, which is faster than their generate(). What the memory
    allows is measured in the same alternation: on a shared machine it changes from minute to
    minute.
    """
    ids = torch.full((1, 1), 2, device=models.device)  # 1 is <image>, and there is none
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    ours, theirs = models.ours, models.theirs
    generator = cast(Any, theirs.language_model)  # a PreTrainedModel, and a GenerationMixin
    runs: dict[str, Callable[[], object]] = {
        OURS: _greedy(ours, ids),
        OURS_GENERATE: functools.partial(ours.model.generate, ids, **settings),
        TRANSFORMERS: _loop(theirs, ids),
        TRANSFORMERS_GENERATE: functools.partial(generator.generate, ids, **settings),
    }
    prompt = ids.expand(1, PROMPT_TOKENS)
    runs |= {name: _loop(models[name], prompt) for name in ATTENTION}
    contenders = {name: Contender(run, NEW_TOKENS) for name, run in runs.items()}
    memory = {n: Contender(r) for n, r in _memory(ours.weight_bytes(), models.device).items()}
    timings = side_by_side({**contenders, **memory}, effort, models.device)
    floor = min(timings.pop(name).median_s for name in memory)
    return Comparison("decode", f"batch 1, {NEW_TOKENS} tokens", "token", timings, floor)


def _memory(size: int, device: str) -> dict[str, Callable[[], object]]:
    """Ways to move `size` bytes through the memory, reading or reading and writing."""
    values = torch.ones(size // 4, device=device)
    half = len(values) // 2
    target = torch.empty(half, device=device)
    return {"read": values.sum, "copy": lambda: target.copy_(values[:half])}


def _greedy(ours: OurVLM, ids: Tensor) -> Callable[[], object]:
    """The harness's own decoding; one token more, so that there are NEW_TOKENS steps."""
    hidden, state = ours.language_model(ours.embed(ids))
    return lambda: greedy(ours.model, hidden[:, -1], state, NEW_TOKENS + 1)


def _loop(model: VLMBase, ids: Tensor) -> Callable[[], object]:
    """A bare greedy loop over the model's step."""
    start, cache = model.prefill(model.embed(ids))

    def run() -> None:
        logits = start
        for _ in range(NEW_TOKENS):
            logits = model.step(logits.argmax(dim=-1), cache)
        model.crop(cache, ids.shape[1])  # every run starts from the same cache

    return run


def _all(models: Models) -> dict[str, VLMBase]:
    return {OURS: models.ours, TRANSFORMERS: models.theirs, **{n: models[n] for n in ATTENTION}}


@torch.inference_mode()
def logits_error(models: Models) -> float:
    """Largest difference of our logits from transformers' Mamba, over the largest logit."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = models.ours.embedding.num_embeddings
    ids = torch.randint(2, vocabulary, (1, 64), generator=generator).to(models.device)
    ours, theirs = (m.prefill(m.embed(ids))[0].float() for m in (models.ours, models.theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max())
