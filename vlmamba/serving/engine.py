"""One thread that answers: greedy requests that wait together are one batch.

Answers equal those of `harness.run`, whatever waits beside them: batches are exact
(vlmamba.generation). Sampled and streamed requests are answered one at a time.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmamba.generation import GroupedGenerator, Tiles, end_tokens, prepared
from vlmamba.models.quantized import count_parameters
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor
from vlmamba.serving.requests import Job, tile_counts


class Full(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Answer:
    """A finished answer, and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    ended: bool  # by the end token or a stop string, not by the limit


@dataclass(eq=False)
class Ticket:
    """A waiting request. `on_text` gets each new piece of a streamed one, from the model's thread;
    `on_end` the answer, or the exception that took its place."""

    job: Job
    on_end: Callable[[Answer | Exception], None]
    on_text: Callable[[str], None] | None = None
    abandoned: threading.Event = field(default_factory=threading.Event)


class Engine:
    """The model and its thread. `waiting` bounds the queue."""

    def __init__(
        self,
        model: VLMambaForConditionalGeneration,
        processor: VLMambaProcessor,
        batch_size: int = 32,
        waiting: int = 1024,
    ) -> None:
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self._queue: queue.Queue[Ticket | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def state_bytes(self) -> int:
        """Memory of one conversation's state, the same at every length; 0 where it grows."""
        return self.model.language_model.new_cache(1).nbytes

    def put(self, ticket: Ticket) -> None:
        """Wait for an answer. Raises Full."""
        try:
            self._queue.put_nowait(ticket)
        except queue.Full:
            raise Full from None

    def close(self) -> None:
        """End the thread after what it is doing."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (ticket := self._queue.get()) is not None:
            together = [ticket]
            while len(together) < self.batch_size:
                try:
                    another = self._queue.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    self._queue.put(None)
                    break
                together.append(another)
            self._answer(together)

    def _answer(self, tickets: list[Ticket]) -> None:
        batches: dict[int, list[Ticket]] = {}
        for ticket in tickets:
            if ticket.on_text is None and ticket.job.greedy:
                batches.setdefault(ticket.job.max_new_tokens, []).append(ticket)
            else:
                self._guarded([ticket], lambda ones: [self._one(ones[0])])
        for batch in batches.values():
            self._guarded(batch, self._batch)

    def _guarded(
        self, tickets: list[Ticket], answer: Callable[[list[Ticket]], list[Answer]]
    ) -> None:
        """Every ticket ends, with its answer or with what went wrong; but those that were left."""
        tickets = [ticket for ticket in tickets if not ticket.abandoned.is_set()]
        if not tickets:
            return
        try:
            answers = answer(tickets)
        except Exception as error:
            if len(tickets) > 1:  # one request must not spoil the others'
                for ticket in tickets:
                    self._guarded([ticket], answer)
            else:
                tickets[0].on_end(error)
            return
        for ticket, one in zip(tickets, answers, strict=True):
            ticket.on_end(one)

    def _batch(self, tickets: list[Ticket]) -> list[Answer]:
        started = time.perf_counter()
        limit = tickets[0].job.max_new_tokens
        generator = GroupedGenerator(self.model, self.processor)
        requests = [prepared(ticket.job.request, self.processor, {}) for ticket in tickets]
        texts = generator.generate(requests, limit, self.batch_size)
        seconds = time.perf_counter() - started
        found = zip(tickets, requests, texts, generator.made, strict=True)
        answers = []
        for ticket, request, text, tokens in found:
            prompt = len(self.processor.encode(request.prompt, tile_counts(request)))
            cut, made = ticket.job.cut(text), len(tokens)
            if cut != text:  # as many as a stream takes until it sees the stop string
                made = next(n for n in range(made + 1) if self._stops(ticket.job, tokens[:n]))
            ended = cut != text or made < limit
            answers.append(Answer(cut, prompt, made, seconds, ended))
        return answers

    @torch.inference_mode()
    def _one(self, ticket: Ticket) -> Answer:
        """One request by itself: sampled, or its words handed on as they come."""
        started, job = time.perf_counter(), ticket.job
        tokens: list[int] = []
        sent = ""
        generator = torch.Generator(self.model.device)
        generator.manual_seed(job.seed if job.seed is not None else time.time_ns() % 2**63)
        features = None
        request = prepared(job.request, self.processor, {})
        shown = [picture.pixels for picture in request.pictures if isinstance(picture, Tiles)]
        if shown:
            features = self.model.encode_images(torch.cat(shown).to(self.model.device))
        prompt = self.processor.encode(request.prompt, tile_counts(request))
        ids = torch.tensor([prompt], device=self.model.device)
        embeds, _ = self.model.embed(ids, image_features=features)
        language_model = self.model.language_model
        length = torch.tensor([ids.shape[1]], device=ids.device)
        hidden, cache = language_model(embeds, None, length)
        last, ends = hidden[:, -1], end_tokens(self.model)
        ended = False
        while len(tokens) < job.max_new_tokens and not ticket.abandoned.is_set():
            token = choose(language_model.head(last)[0], job, generator)
            if token in ends:
                ended = True
                break
            tokens.append(token)
            text = self._decoded(tokens)
            if job.cut(text) != text:  # as `_stops` says
                ended = True
                break
            sure = job.sure(text)
            half = text.endswith("\ufffd")  # a character
            if ticket.on_text is not None and not half and len(sure) > len(sent):
                ticket.on_text(sure[len(sent) :])
                sent = sure
            if len(tokens) < job.max_new_tokens:
                one = torch.tensor([token], device=self.model.device)
                last = language_model.step(language_model.embed(one, cache.pictured), cache)
        text = job.cut(self._decoded(tokens))
        if ticket.on_text is not None and len(text) > len(sent):
            ticket.on_text(text[len(sent) :])
        seconds = time.perf_counter() - started
        return Answer(text, ids.shape[1], len(tokens), seconds, ended)

    def _decoded(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _stops(self, job: Job, tokens: list[int]) -> bool:
        """Whether so many tokens hold a stop string."""
        text = self._decoded(tokens)
        return job.cut(text) != text


def choose(logits: torch.Tensor, job: Job, generator: torch.Generator) -> int:
    """The next token of (V,) logits: the likeliest, or a draw by temperature and top_p."""
    if job.greedy:
        return int(logits.argmax())
    chances, order = (logits.float() / job.temperature).softmax(-1).sort(descending=True)
    chances[(chances.cumsum(-1) - chances) > job.top_p] = 0.0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


def describe(engine: Engine) -> dict[str, Any]:
    """What the page shows of the model."""
    return {"parameters": count_parameters(engine.model), "state_bytes": engine.state_bytes}
