"""Greedy decoding of any transformers VLM with one image prefix for all questions of a picture.

    decoder = SharedPrefix(model)
    prefix = decoder.prefill(prompt)                       # the image and what is in front of it
    batch = decoder.start([prefix, prefix], [ids, ids])    # each question from a copy of its cache
    batch.step(tokens)                                     # batch.logits are those after it

The picture's part of a prompt goes through the model's own forward once; every question continues a
copy of the cache.  Rows of unequal length are padded in front of their question, with the mask and
the positions given to the model, so that a row computes what it computes alone.  That holds for
attention over the whole past only: `compare` measures a model instead of believing it.

Sizes: B rows, L new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vlmamba.models.language.wrapped import WrappedCache

ACROSS = "cross_attention_mask"
PICTURES = frozenset(("pixel_values", "pixel_values_images", "image_pixel_values"))

# How questions are answered, the fastest first
BATCHED = "shared image prefix, padded batches"
EQUAL = "shared image prefix, batches of equal lengths"
ALONE = "one by one"

TOLERANCE = 1e-4  # of logits in float32, relative to the largest; other types: a few of their steps
STEPS = 4  # tokens that `compare` decodes


@dataclass(frozen=True)
class Prompt:
    """What the model's processor makes of one request.

    inputs: its tensors of one row.  shared: how many of the first tokens all questions about the
    same pictures have in common (up to the last image token); 0 without pictures.
    """

    inputs: Mapping[str, Tensor]
    shared: int

    @property
    def ids(self) -> Tensor:
        """(L,) all tokens."""
        return self.inputs["input_ids"][0]

    @property
    def question(self) -> Tensor:
        """(L - shared,) the tokens after the pictures."""
        return self.ids[self.shared :]


@dataclass(frozen=True)
class Prefix:
    """A cache of one row, and how far the next token's position is from the number of tokens.

    across: (1, 1, pictures, tiles), which tiles layers that attend to pictures (Llama-3.2-Vision's)
    show to every token from here on; None in other models.
    """

    cache: WrappedCache
    offset: int
    across: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self.cache.mask.shape[1]


@dataclass(frozen=True)
class Comparison:
    """How far the logits of shared prefixes in a batch are from those of each prompt alone.

    error: largest difference over the largest logit.
    """

    error: float
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether both are the same computation."""
        return self.error <= self.tolerance


class Batch:
    """Questions decoded together. logits: (B, V) float32 after the last token of each row."""

    def __init__(
        self,
        decoder: SharedPrefix,
        cache: WrappedCache,
        offsets: Tensor,
        across: Tensor | None = None,
    ) -> None:
        self._decoder, self._cache, self._offsets, self._across = decoder, cache, offsets, across
        self.logits = torch.empty(0)

    def read(self, ids: Tensor, real: Tensor) -> None:
        """Go on by ids (B, L); real (B, L) bool: False on padding, which is on the left."""
        seen = self._cache.lengths.unsqueeze(1) + self._offsets
        positions = (seen + real.cumsum(dim=1) - 1).clamp(min=0)
        self._cache.mask = torch.cat([self._cache.mask, real], dim=1)
        tiles = self._across
        shown = {} if tiles is None else {ACROSS: tiles.expand(-1, ids.shape[1], -1, -1)}
        output = self._decoder.forward(
            **shown,
            input_ids=ids,
            attention_mask=self._cache.mask.long(),
            position_ids=positions,
            past_key_values=self._cache.layers,
        )
        self.logits = output.logits[:, -1].float()

    def step(self, tokens: Tensor) -> None:
        """Go on by one token a row, (B,)."""
        self.read(tokens.unsqueeze(1), torch.ones_like(tokens, dtype=torch.bool).unsqueeze(1))

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self._cache, self._offsets = self._cache.select(rows), self._offsets[rows]
        self._across = None if self._across is None else self._across[rows]
        self.logits = self.logits[rows]


class SharedPrefix:
    """Prefills and batches of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes = inspect.signature(model.forward).parameters

    def forward(self, **inputs: Any) -> Any:
        """The model's output with logits of the last token only, where it can do that."""
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs, use_cache=True, return_dict=True)

    def prefill(self, prompt: Prompt) -> Prefix:
        """Read the pictures and what is in front of them."""
        if not prompt.shared:
            if prompt.inputs.keys() & PICTURES:
                raise TypeError("its configuration does not say which token stands for a picture")
            config = self.model.config.get_text_config()
            mask = torch.zeros(1, 0, dtype=torch.bool, device=self.model.device)
            return Prefix(WrappedCache(DynamicCache(config=config), mask), 0)
        output = self.forward(**_first_tokens(prompt))
        cache = output.past_key_values
        if not isinstance(cache, DynamicCache):
            raise TypeError(f"the cache is a {type(cache).__name__}, which is not one to copy")
        mask = torch.ones(1, prompt.shared, dtype=torch.bool, device=self.model.device)
        across = prompt.inputs.get(ACROSS)
        shown = None if across is None else across[:, -1:]  # a question stands behind all pictures
        return Prefix(WrappedCache(cache, mask), self._offset(), shown)

    def start(self, prefixes: Sequence[Prefix], questions: Sequence[Tensor]) -> Batch:
        """A batch that has read each question (its token ids) after its prefix.

        Rows of the same prefix stand next to each other.
        """
        offsets = torch.tensor([[p.offset] for p in prefixes], device=self.model.device)
        shown = [p.across for p in prefixes if p.across is not None]
        across = torch.cat(shown) if len(shown) == len(prefixes) else None
        batch = Batch(self, _join(prefixes, self.model), offsets, across)
        ids, real = _left_pad(questions)
        batch.read(ids, real)
        return batch

    def compare(
        self, prompts: Sequence[Prompt], same: Sequence[int], equal_lengths: bool = False
    ) -> Comparison:
        """Measure a few greedy steps of a batch against the library's own generate().

        same: for each prompt the number of its pictures; equal numbers stand together.
        equal_lengths: only rows that need no padding are decoded together.
        """
        alone = [self._alone(prompt) for prompt in prompts]
        prefixes = {number: self.prefill(prompts[same.index(number)]) for number in set(same)}
        by_length: dict[Any, list[int]] = {}
        for row, (prompt, number) in enumerate(zip(prompts, same, strict=True)):
            key = batch_key(EQUAL if equal_lengths else BATCHED, prefixes[number], prompt)
            by_length.setdefault(key, []).append(row)
        error = largest = 0.0
        for rows in by_length.values():
            batch = self.start(
                [prefixes[same[r]] for r in rows], [prompts[r].question for r in rows]
            )
            for step in range(STEPS):
                for place, row in enumerate(rows):
                    tokens, logits = alone[row]
                    if step < len(tokens):
                        error = max(error, float((batch.logits[place] - logits[step]).abs().max()))
                        largest = max(largest, float(logits[step].abs().max()))
                following = [alone[row][0][min(step, len(alone[row][0]) - 1)] for row in rows]
                batch.step(torch.tensor(following, device=self.model.device))
        steps = 16 * torch.finfo(self.model.dtype).eps
        return Comparison(error / max(largest, 1.0), max(TOLERANCE, steps))

    def _alone(self, prompt: Prompt) -> tuple[list[int], list[Tensor]]:
        """Tokens and logits (V,) of the library's own greedy decoding."""
        generate: Any = self.model.generate
        output = generate(
            **prompt.inputs,
            **GREEDY,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = [step[0].float() for step in output.logits]
        return output.sequences[0, -len(logits) :].tolist(), logits

    def _offset(self) -> int:
        """Qwen-VL and its kin count an image's tokens by its longer side: kept at a prefill."""
        deltas = getattr(getattr(self.model, "model", None), "rope_deltas", None)
        return 0 if deltas is None else int(deltas.flatten()[0])


# What makes generate() greedy whatever the model's own generation settings say
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def batch_key(mode: str, prefix: Prefix, prompt: Prompt) -> Any:
    """Requests with equal keys may be decoded together."""
    # a sliding window counts columns, so that padding would push real tokens out of it
    if mode == EQUAL or any(prefix.cache.layers.is_sliding):
        return prefix.tokens, len(prompt.question)
    # a cache without tokens cannot be joined to others, nor rows of unlike numbers of pictures
    # where layers keep those apart from the text
    return bool(prefix.tokens), prefix.cache.lengths_apart


def _first_tokens(prompt: Prompt) -> dict[str, Tensor]:
    """The inputs cut to the shared tokens; images as they are."""
    shape = prompt.inputs["input_ids"].shape
    return {
        name: value[:, : prompt.shared] if value.shape == shape else value
        for name, value in prompt.inputs.items()
    }


def _join(prefixes: Sequence[Prefix], model: PreTrainedModel) -> WrappedCache:
    """One cache with a copy of each prefix as a row."""
    runs: list[tuple[Prefix, list[int]]] = []
    for row, prefix in enumerate(prefixes):
        if runs and runs[-1][0] is prefix:
            runs[-1][1].append(row)
        else:
            runs.append((prefix, [row]))

    def copies(prefix: Prefix, rows: list[int]) -> WrappedCache:
        return prefix.cache.select(torch.zeros(len(rows), dtype=torch.long, device=model.device))

    if len(runs) == 1:
        return copies(*runs[0])
    mask = torch.zeros(len(prefixes), 0, dtype=torch.bool, device=model.device)
    joined = WrappedCache(DynamicCache(config=model.config.get_text_config()), mask)
    for prefix, rows in runs:
        joined.write_rows(torch.tensor(rows, device=model.device), copies(prefix, rows))
    return joined


def _left_pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """ids (B, L) and which of them are real."""
    columns = max(len(row) for row in rows)
    ids = rows[0].new_zeros(len(rows), columns)
    real = torch.zeros(len(rows), columns, dtype=torch.bool, device=ids.device)
    for place, row in enumerate(rows):
        ids[place, columns - len(row) :] = row
        real[place, columns - len(row) :] = True
    return ids, real
