"""transformers' own forward pass as a contender: none of this project's code while the clock runs.

    logits, cache = prefill(language_model, embeds)
    logits = step(language_model, tokens, cache)
    crop(cache, tokens)                       # every run starts from the same cache

`language_model` is a causal language model of transformers with its head, as its users call it:
`model.language_model.model` of a wrapped one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def hidden(language_model: PreTrainedModel, embeds: Tensor) -> Tensor:
    """(B, L, D) -> last hidden states (B, L, D), for a loss."""
    return language_model.base_model(inputs_embeds=embeds, use_cache=False)[0]


def prefill(language_model: PreTrainedModel, embeds: Tensor) -> tuple[Tensor, Any]:
    """(B, L, D) -> logits after the last token (B, V) and transformers' cache."""
    output = language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], output[_cache_name(language_model)]


def step(language_model: PreTrainedModel, tokens: Tensor, cache: Any) -> Tensor:
    """One token each (B,) -> logits (B, V); the cache is updated in place."""
    cached = {_cache_name(language_model): cache}
    return language_model(input_ids=tokens[:, None], use_cache=True, **cached).logits[:, -1]


def crop(cache: Any, tokens: int) -> None:
    """Forget all but the first `tokens` keys and values; a recurrent state is left as it is."""
    if not any(cache.is_linear):
        cache.crop(min(0, tokens - cache.get_seq_length()))  # counts what to remove


def _cache_name(language_model: PreTrainedModel) -> str:
    return "cache_params" if language_model.config.model_type == "mamba" else "past_key_values"
