"""Prefill and decode of a 130M-shaped Mamba: ours, transformers' with the same weights, and
transformers of about that size with their key-value cache.

Batch 1. A prompt of 1024 tokens; 32 generated tokens, greedy. All are built alike; the baselines
are then called as transformers' users call them (harness.speed.transformers_direct).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.speed import models, transformers_direct
from harness.speed.machine import Machine
from harness.speed.timing import VL_MAMBA, Comparison, Contender, Effort, side_by_side
from vlmamba.generation import greedy
from vlmamba.models.language import WrappedLM
from vlmamba.models.vlm import VLMambaForConditionalGeneration

SIZE = "130m"
PROMPT_TOKENS = 1024
NEW_TOKENS = 32
TRANSFORMERS = "transformers Mamba"
VL_MAMBA_GENERATE = "VL-Mamba, generate()"
TRANSFORMERS_GENERATE = "transformers Mamba, generate()"
VL_MAMBA_BFLOAT16 = f"{VL_MAMBA}, bfloat16"
TRANSFORMERS_BFLOAT16 = "transformers Mamba, bfloat16"
ATTENTION = ("pythia-160m", "llama-160m")
NEVER = -1  # an end token that no model writes


@dataclass
class Models:
    """The models of a run, each built when first needed; both Mambas share their weights."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    built: dict[str, VLMambaForConditionalGeneration] = field(default_factory=dict)

    def __getitem__(self, name: str) -> VLMambaForConditionalGeneration:
        if name not in self.built:
            model = models.build(name, dtype=self.dtype, device=self.device)
            if name == f"transformers-mamba-{SIZE}":
                share_weights(self.vl_mamba, model)
            never_end(model)
            self.built[name] = model
        return self.built[name]

    @property
    def vl_mamba(self) -> VLMambaForConditionalGeneration:
        """The model under test."""
        return self[f"vl-mamba-{SIZE}"]

    @property
    def baseline(self) -> VLMambaForConditionalGeneration:
        """The same with transformers' Mamba as language model, of the same weights."""
        return self[f"transformers-mamba-{SIZE}"]

    def direct(self, name: str = f"transformers-mamba-{SIZE}") -> PreTrainedModel:
        """transformers' own language model inside the baseline called `name`."""
        return _inner(self[name])


def _inner(model: VLMambaForConditionalGeneration) -> PreTrainedModel:
    return cast(WrappedLM, model.language_model).model


def share_weights(
    model: VLMambaForConditionalGeneration, baseline: VLMambaForConditionalGeneration
) -> None:
    """Copy our parameters into transformers' Mamba."""
    renamed = {
        "backbone." + name.replace("embedding.", "embeddings."): value
        for name, value in model.language_model.state_dict().items()
        if not name.startswith("lm_head.")
    }
    renamed["lm_head.weight"] = model.language_model.embedding.weight
    _inner(baseline).load_state_dict(renamed)
    _inner(baseline).tie_weights()
    baseline.connector = model.connector


def never_end(model: VLMambaForConditionalGeneration) -> None:
    """Every answer is as long as it may be."""
    wrapped = isinstance(model.language_model, WrappedLM)
    for generating in (model, *([_inner(model)] if wrapped else [])):
        generating.config.eos_token_id = NEVER
        cast(Any, generating.generation_config).eos_token_id = None


@torch.inference_mode()
def prefill(models_: Models, effort: Effort, machine: Machine, narrow: Models) -> Comparison:
    """From the prompt's embeddings to the logits after its last token; both Mambas in bfloat16 too.

    narrow: the models in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (1, PROMPT_TOKENS), generator=generator).to(models_.device)
    runs: dict[str, Callable[[], object]] = {VL_MAMBA: own_prefill(models_.vl_mamba, ids)}
    runs |= {label: direct_prefill(m, ids) for label, m in _baselines(models_).items()}
    runs[VL_MAMBA_BFLOAT16] = own_prefill(narrow.vl_mamba, ids)
    runs[TRANSFORMERS_BFLOAT16] = direct_prefill(narrow.direct(), ids)
    contenders = {name: Contender(run) for name, run in runs.items()}
    flops = models.prefill_flops(models_.vl_mamba.language_model, PROMPT_TOKENS)
    return Comparison(
        "prefill",
        f"batch 1, {PROMPT_TOKENS} tokens",
        "run",
        side_by_side(contenders, effort, models_.device),
        machine.prefill_floor_s(flops),
        narrow_floor_s=flops / machine.gemm_bf16_flops_per_s,
    )


def own_prefill(model: VLMambaForConditionalGeneration, ids: Tensor) -> Callable[[], object]:
    """Ours, from a prompt's tokens to the logits after the last."""
    return lambda: models.prefill(model, models.embed(model, ids))


def direct_prefill(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """The same of a model of transformers."""
    embedding = model.get_input_embeddings()
    return lambda: transformers_direct.prefill(model, embedding(ids))


def _baselines(models_: Models) -> dict[str, PreTrainedModel]:
    return {TRANSFORMERS: models_.direct(), **{name: models_.direct(name) for name in ATTENTION}}


@torch.inference_mode()
def decode(models_: Models, effort: Effort) -> Comparison:
    """Seconds for a token after the prompt; transformers with attention hold 1024 in their cache.

    generate() starts from one token, so that it is generation that is timed. Attention models run
    a bare loop over their forward pass, which is faster than their generate(). What the memory
    allows is measured in the same alternation: on a shared machine it changes from minute to
    minute.
    """
    ids = torch.full((1, 1), 2, device=models_.device)  # 1 is <image>, and there is none
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    model, generator = models_.vl_mamba, cast(Any, models_.direct())  # a GenerationMixin too
    runs: dict[str, Callable[[], object]] = {
        VL_MAMBA: _greedy(model, ids),
        VL_MAMBA_GENERATE: functools.partial(model.generate, ids, **settings),
        TRANSFORMERS: _loop(models_.direct(), ids),
        TRANSFORMERS_GENERATE: functools.partial(generator.generate, ids, **settings),
    }
    prompt = ids.expand(1, PROMPT_TOKENS)
    runs |= {name: _loop(models_.direct(name), prompt) for name in ATTENTION}
    contenders = {name: Contender(run, NEW_TOKENS) for name, run in runs.items()}
    moved = _memory(models.weight_bytes(model.language_model), models_.device)
    memory = {name: Contender(run) for name, run in moved.items()}
    timings = side_by_side({**contenders, **memory}, effort, models_.device)
    floor = min(timings.pop(name).median_s for name in memory)
    return Comparison("decode", f"batch 1, {NEW_TOKENS} tokens", "token", timings, floor)


def _memory(size: int, device: str) -> dict[str, Callable[[], object]]:
    """Ways to move `size` bytes through the memory, reading or reading and writing."""
    values = torch.ones(size // 4, device=device)
    half = len(values) // 2
    target = torch.empty(half, device=device)
    return {"read": values.sum, "copy": lambda: target.copy_(values[:half])}


def _greedy(model: VLMambaForConditionalGeneration, ids: Tensor) -> Callable[[], object]:
    """The harness's own decoding; one token more, so that there are NEW_TOKENS steps."""
    hidden, state = model.language_model(models.embed(model, ids))
    return lambda: greedy(model, hidden[:, -1], state, NEW_TOKENS + 1)


def _loop(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """A bare greedy loop over transformers' forward pass."""
    start, cache = transformers_direct.prefill(model, model.get_input_embeddings()(ids))

    def run() -> None:
        logits = start
        for _ in range(NEW_TOKENS):
            logits = transformers_direct.step(model, logits.argmax(dim=-1), cache)
        transformers_direct.crop(cache, ids.shape[1])  # every run starts from the same cache

    return run


@torch.inference_mode()
def logits_error(models_: Models) -> float:
    """Largest difference of our logits from transformers' Mamba, over the largest logit."""
    generator = torch.Generator().manual_seed(1)
    model, baseline = models_.vl_mamba, models_.direct()
    vocabulary = model.language_model.embedding.num_embeddings
    ids = torch.randint(2, vocabulary, (1, 64), generator=generator).to(models_.device)
    logits = models.prefill(model, models.embed(model, ids))[0].float()
    embeds = baseline.get_input_embeddings()(ids)
    expected = transformers_direct.prefill(baseline, embeds)[0].float()
    return float((logits - expected).abs().max() / expected.abs().max())
