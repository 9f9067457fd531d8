"""Batches of questions to a transformers VLM that share their pictures' prefixes.

waiting = Waiting(model, limits, batch_size, on_done)
waiting.add(index, prompt, prefix, seed)     # decodes where a batch is full
waiting.flush()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, StoppingCriteria

from harness.models.base import Limits, OnDone
from harness.models.resumable import is_out_of_memory
from harness.models.shared_prefix import Batch, Prefix, Prompt, batch_key
from vlmamba.generation import Sampler
from vlmamba_core.errors import one_line

if TYPE_CHECKING:
    from harness.models.transformers import TransformersModel


# Where time goes: a library's model encodes pictures within the forward that reads the prompt
READING, DECODE = "encode_prefill", "decode"


# What a processor or a model raises for a request that it does not take
NOT_TAKEN = (ValueError, TypeError, IndexError, KeyError, RuntimeError)


def why_not(error: Exception) -> str:
    """What to say of a request that was not taken. Raises the error where memory ran out."""
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {one_line(str(error))[:300]}"


class Row(NamedTuple):
    """A question that waits."""

    number: int
    prompt: Prompt
    prefix: Prefix
    seed: str


class Waiting:
    """Questions that wait until a batch of them is full: greedy, or drawn at a temperature."""

    def __init__(
        self, model: TransformersModel, limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        self._model, self._limits, self._size, self._on_done = model, limits, batch_size, on_done
        self._rows: dict[Any, list[Row]] = {}

    def add(self, index: int, prompt: Prompt, prefix: Prefix, seed: int) -> None:
        """Decode a batch where this question fills one. seed: of what is drawn for it."""
        key = batch_key(self._model.mode, prefix, prompt)
        rows = self._rows.setdefault(key, [])
        rows.append(Row(index, prompt, prefix, str(seed)))
        if len(rows) >= self._size:
            self._decode(self._rows.pop(key))
        elif len({id(row.prefix) for rows in self._rows.values() for row in rows}) > self._size:
            fullest = max(self._rows, key=lambda key: len(self._rows[key]))
            self._decode(self._rows.pop(fullest))

    def flush(self) -> None:
        """Decode what is left."""
        while self._rows:
            self._decode(self._rows.pop(next(iter(self._rows))))

    def _decode(self, rows: list[Row]) -> None:
        """Answer a batch; where the model fails on it, each of its questions alone."""
        open_ = {row.number for row in rows}
        try:
            self._decode_together(rows, open_)
        except NOT_TAKEN as error:
            reason = why_not(error)
            if len(rows) == 1:
                self._on_done(rows[0].number, None, reason)
                return
            for row in rows:
                if row.number in open_:
                    self._decode([row])

    def _decode_together(self, rows: list[Row], open_: set[int]) -> None:
        """The tokens of a batch; rows that have ended leave it once half of them have.

        open_: numbers of the questions without an answer, which leave it with theirs.
        """
        model = self._model
        with model.timed(READING):
            batch = model.decoder.start([r.prefix for r in rows], [r.prompt.question for r in rows])
        sampler = Sampler(model.temperature, [r.seed for r in rows]) if model.temperature else None
        alive = list(range(len(rows)))  # the row of each place in the batch
        tokens: list[list[int]] = [[] for _ in rows]
        ended: set[int] = set()
        while True:
            with model.timed(DECODE):
                logits = self._logits(batch, [(rows[r].prompt, tokens[r]) for r in alive])
                likely = logits.argmax(dim=-1) if sampler is None else sampler(logits, alive)
                chosen = likely.tolist()
            for place, row in enumerate(alive):
                if row in ended:
                    continue
                tokens[row].append(chosen[place])
                if self._is_end(tokens[row]):
                    ended.add(row)
                    open_.remove(rows[row].number)
                    self._on_done(rows[row].number, model.text(tokens[row]))
            if len(ended) == len(rows):
                return
            going = [place for place, row in enumerate(alive) if row not in ended]
            with model.timed(DECODE):
                if 2 * len(going) <= len(alive):
                    batch.select(torch.tensor(going, device=model.device))
                    alive = [alive[place] for place in going]
                    chosen = [chosen[place] for place in going]
                batch.step(torch.tensor(chosen, device=model.device))

    def _logits(self, batch: Batch, sofar: Sequence[tuple[Prompt, Sequence[int]]]) -> Tensor:
        logits = batch.logits
        penalty = self._model.model.generation_config.repetition_penalty
        if penalty not in (None, 1.0):
            penalise = RepetitionPenaltyLogitsProcessor(penalty)
            rows = []
            for place, (prompt, tokens) in enumerate(sofar):  # each without another's padding
                ids = torch.cat([prompt.ids, prompt.ids.new_tensor(tokens)])
                rows.append(penalise(ids[None], logits[place, None]))
            logits = torch.cat(rows)
        return logits

    def _is_end(self, tokens: Sequence[int]) -> bool:
        """Whether an answer is complete: its end token, its limit, or a stop string."""
        if tokens[-1] in self._model.ends or len(tokens) >= self._limits.max_new_tokens:
            return True
        return _has_stop(self._model.text(tokens), self._limits.until)


class FirstToken(StoppingCriteria):
    """Notes when generate() has its first token: what came before read the prompt.

    begin: where the answer begins in what generate() returns, whose own rule it is: behind the
    prompt, behind an encoder-decoder's first token, or at once (InstructBLIP on T5).
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.at: float | None = None
        self.begin = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        if self.at is None:
            self.at, self.begin = self._now(), input_ids.shape[1] - 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Stops(StoppingCriteria):
    """Ends generate() at a stop string. first: what stands before it in the list of criteria."""

    def __init__(self, model: TransformersModel, first: FirstToken, until: Sequence[str]) -> None:
        self._model, self._first, self._until = model, first, until

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        texts = [self._model.text(row[self._first.begin :].tolist()) for row in input_ids]
        ended = [_has_stop(text, self._until) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _has_stop(text: str, until: Sequence[str]) -> bool:
    whole = text.rstrip("\ufffd")  # a character whose last bytes are still to come
    return any(stop in whole for stop in until)
