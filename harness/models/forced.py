"""How likely a transformers VLM thinks a given continuation of a prompt.

    log_probability(model, inputs, [42, 7])     # (sum over the tokens, their number, greedy?)

The tokens are forced on the library's own generate(), one by one: positions, caches and masks of
every kind of model are then those of its answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from harness.models.shared_prefix import GREEDY


class Forced(LogitsProcessor):
    """Leaves one token to choose at each step."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._left = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Of the scores (1, V) all but the next token's at minus infinity."""
        only = torch.full_like(scores, -torch.inf)
        only[:, next(self._left)] = 0.0
        return only


def log_probability(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], tokens: Sequence[int]
) -> tuple[float, int, bool]:
    """(log-probability of the tokens after a prompt of one row, their number, all likeliest?)."""
    if not tokens:
        return 0.0, 0, True
    generate: Any = model.generate
    output = generate(
        **inputs,
        **GREEDY,
        max_new_tokens=len(tokens),
        logits_processor=LogitsProcessorList([Forced(tokens)]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack([step[0] for step in output.logits]).double()
    wanted = torch.tensor(list(tokens)[: len(logits)], device=logits.device)
    chances = logits.log_softmax(dim=-1).gather(1, wanted[:, None])
    return float(chances.sum()), len(tokens), bool((logits.argmax(dim=-1) == wanted).all())
