"""Exact batched greedy decoding with one image prefill shared by all its questions.

Requests are grouped by image.  The system sentence and the image are prefilled once per distinct
image (with all its tiles); because a Mamba state is a small value, every question of the image
starts from a copy of it.  Questions are right-padded, padded steps leave the state untouched, and
rows that have answered leave the batch, so an answer does not depend on its neighbors.
Requests of equal image and prompt (several sampled answers) share their whole prefill.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmamba.models.language import Cache
from vlmamba.models.linear import MOST_ROWS
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.processing import VLMambaProcessor, check_tags, split_text, tokens_behind
from vlmamba_core.chunks import chunks
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IMAGE, without_tags

# Tokens of one pass over images on a CPU: more would push a layer's activations out of its cache.
CACHED_TOKENS = 2048
PARTS = ("encode", "prefill", "decode")  # of the time that answers take


@dataclass(frozen=True)
class Tiles:
    """A picture made ready: the pixels (tiles, 3, H, W) of all its tiles."""

    pixels: Tensor

    @classmethod
    def of(cls, image: Image.Image, processor: VLMambaProcessor) -> Tiles:
        """What the model is shown of a picture."""
        return cls(processor.tiled([image])[0])


Picture = Image.Image | Callable[[], Image.Image] | Tiles


@dataclass(frozen=True)
class Request:
    """One question. `image_key` identifies the content of its images: requests of equal keys share
    one pass over them; None: shared with no other request.

    `image` may be the picture or a function that loads it (called once per distinct key), or a
    sequence of them, one for each tag of the prompt in reading order.  `seed`: of the random
    numbers of this request's answer, where answers are sampled.  `suffix`: the tokens of the text
    behind the last image where they are known, see `prepared`.
    """

    prompt: str
    image_key: str | None = None
    image: Picture | Sequence[Picture] | None = None
    seed: str = ""
    suffix: tuple[int, ...] | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All of them, none where there is no image."""
        if self.image is None:
            return ()
        return tuple(self.image) if isinstance(self.image, Sequence) else (self.image,)


def prepared(request: Request, processor: VLMambaProcessor, tiles: dict[str, Tiles]) -> Request:
    """The request with its text as tokens and its pictures as pixels, which changes no answer.

    tiles: pictures made ready already, by image key and place; this request's are added where it
    has a key.  Touches no model: a thread may do it while one computes.
    """
    known = {} if request.image_key is None else tiles
    ready: list[Picture] = []
    for place, picture in enumerate(request.pictures):
        key = f"{request.image_key} {place}"
        if key not in known:
            image = picture() if callable(picture) else picture
            known[key] = image if isinstance(image, Tiles) else Tiles.of(image, processor)
        ready.append(known[key])
    _, suffix = _split(request.prompt, processor)
    return replace(request, image=ready or None, suffix=tuple(suffix))


class GroupedGenerator:
    """Greedy answers for many requests, or sampled ones where `temperature` is above 0.

    A sampled answer depends on its request and the request's seed, not on its batch.
    stand_in: features (1, P, Dv) that are shown in place of every picture, as its one tile (blind
    runs); no picture is loaded then.  seconds: of all calls so far, by part: encode (pictures to
    features), prefill (features and text to states), decode (the answers' tokens).  tokens: read
    ("prefill") and made ("decode") in all calls so far.  made: the tokens of each answer of the
    last `generate`, the end token left out.
    """

    def __init__(
        self,
        model: VLMambaForConditionalGeneration,
        processor: VLMambaProcessor,
        stand_in: Tensor | None = None,
        temperature: float = 0.0,
    ):
        self.model, self.processor, self.stand_in = model, processor, stand_in
        self.temperature = temperature
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.tokens = {"prefill": 0, "decode": 0}
        self.made: list[list[int]] = []

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `seconds`, a GPU's queued work included."""
        self._wait()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[part] += time.perf_counter() - started

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _most_rows(self, batch_size: int) -> int:
        """On a CPU those that the kernels for single tokens take.

        Of more, others would add in another order, and a row's last bits depend on its neighbors.
        """
        return min(batch_size, MOST_ROWS) if self.model.device.type == "cpu" else batch_size

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        batch_size: int = 32,
        on_done: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """The answers, in the requests' order; `on_done(index, answer)` as each one ends.

        Raises UserError, before any is answered, for a prompt whose `<image>` tags are not as many
        as its pictures, and for one that does not end with text.
        """
        for number, request in enumerate(requests, 1):
            _check(request, number)
        answers = [""] * len(requests)
        self.made = [[] for _ in requests]

        def finish(items: Sequence[_Question], outputs: Sequence[list[int]]) -> None:
            for item, tokens in zip(items, outputs, strict=True):
                text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
                answers[item.index] = text.strip()
                self.made[item.index] = tokens
                if on_done is not None:
                    on_done(item.index, answers[item.index])

        batch_size = self._most_rows(batch_size)
        for alike, state in self._batches(requests, batch_size, _alike):
            firsts = [same[0] for same in alike]
            if state is None:
                last, after = self._read_whole(firsts, requests)
            else:
                last, after = self._read(state, [first.suffix for first in firsts])
            for some in self._decoded(alike, requests, last, after, max_new_tokens, batch_size):
                finish(*some)
        return answers

    @torch.inference_mode()
    def loglikelihood(
        self,
        requests: Sequence[Request],
        continuations: Sequence[str],
        batch_size: int = 32,
        on_done: Callable[[int, float, int, bool], None] | None = None,
    ) -> list[tuple[float, int, bool]]:
        """How likely each request is continued by that text: (log-probability, tokens, greedy).

        Of the continuation's tokens, which are split apart from the prompt's as in training, the
        sum of their natural log-probabilities, their number, and whether each is the likeliest in
        its place.
        Batches, shared images and errors are those of `generate`.
        """
        for number, request in enumerate(requests, 1):
            _check(request, number)
        batch_size = self._most_rows(batch_size)
        found = [(0.0, 0, True)] * len(requests)
        tokenizer = self.processor.tokenizer
        told = [tokens_behind(tokenizer, without_tags(text)) for text in continuations]
        for alone, state in self._batches(requests, batch_size, _apart):
            items = [item for (item,) in alone]
            targets = [told[item.index] for item in items]
            if state is None:
                hidden, _, lengths = self._hidden_whole(items, requests, targets)
            else:
                rows = [item.suffix + more for item, more in zip(items, targets, strict=True)]
                hidden, _, lengths = self._hidden(state, rows)
            for row, (item, target) in enumerate(zip(items, targets, strict=True)):
                end = int(lengths[row]) - 1  # the last token predicts nothing that is asked
                scores = self._token_scores(hidden[row, end - len(target) : end], target)
                found[item.index] = scores
                if on_done is not None:
                    on_done(item.index, *scores)
        return found

    def _token_scores(self, hidden: Tensor, target: Sequence[int]) -> tuple[float, int, bool]:
        """Of the states (T, D) before T tokens: sum of log-probabilities, T, all likeliest."""
        logits = self.model.language_model.head(hidden).float()
        tokens = torch.tensor(target, device=logits.device, dtype=torch.long)
        chosen = logits.log_softmax(-1).gather(1, tokens[:, None])
        greedy = bool((logits.argmax(-1) == tokens).all())
        return float(chosen.double().sum()), len(target), greedy

    @torch.inference_mode()
    def sampled(self, request: Request, max_new_tokens: int, seed: int, **settings: Any) -> str:
        """One answer by generate() under its settings (do_sample, temperature, num_beams...).

        The same seed gives the same answer; the generators outside are left as they were.
        """
        _check(request, 1)
        features, tiles = self._image_features([request])
        ids = torch.tensor([self.processor.encode(request.prompt, tiles[0])])
        ids = ids.to(self.model.device)
        shown = {} if features is None else {"image_features": features}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        generate: Any = self.model.generate
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            with self._timed("decode"):  # generate() does not tell its prefill apart
                tokens = generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    **shown,
                    **settings,
                )
        answer = tokens[0, ids.shape[1] :]
        self.tokens["prefill"] += ids.shape[1]
        self.tokens["decode"] += len(answer)
        return self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _batches(
        self,
        requests: Sequence[Request],
        batch_size: int,
        together: Callable[[Sequence[_Question]], list[list[_Question]]],
    ) -> Iterator[tuple[list[list[_Question]], Cache | None]]:
        """Questions that are read at a time, and the state behind each one's prefix.

        None in place of it: the model cannot continue a prefix.  together: which questions of one
        prefix are read as one; the state has a row for each such list.
        """
        pending = _by_prefix(requests, self.processor)
        if not self.model.language_model.batches:
            batch_size = 1
        if not self.model.language_model.shares_prefix:
            everything = [same for group in pending.values() for same in together(group)]
            for alike in chunks(everything, batch_size):
                yield list(alike), None
            return
        for chunk in chunks(list(pending.values()), batch_size):
            state = self._prefill_images([group[0] for group in chunk], requests)
            questions = [(row, same) for row, group in enumerate(chunk) for same in together(group)]
            # similar lengths together: less padding
            questions.sort(key=lambda q: len(q[1][0].suffix))
            for batch in chunks(questions, batch_size):
                rows = torch.tensor([row for row, _ in batch], device=self.model.device)
                yield [same for _, same in batch], state.select(rows)

    def _prefill_images(self, firsts: list[_Question], requests: Sequence[Request]) -> Cache:
        """States after the prefix of each group's first question, (len(firsts) rows)."""
        state = self.model.init_state(len(firsts))
        rows = [row for row, first in enumerate(firsts) if first.prefix]
        at_once = len(rows)
        if rows and self.model.device.type == "cpu":
            longest = max(self._longest(firsts[row].prefix) for row in rows)
            at_once = max(1, CACHED_TOKENS // longest)
        for some in chunks(rows, max(1, at_once)):
            features, tiles = self._image_features([requests[firsts[row].index] for row in some])
            prefixes = [firsts[row].prefix for row in some]
            ids, lengths = _right_pad(list(map(self.processor.encode, prefixes, tiles)), self.model)
            self.tokens["prefill"] += int(lengths.sum())
            with self._timed("prefill"):
                embeds, _ = self.model.embed(ids, image_features=features)
                _, prefilled = self.model.language_model(embeds, None, lengths)
                state.write_rows(torch.tensor(some, device=self.model.device), prefilled)
        return state

    def _read_whole(
        self, items: Sequence[_Question], requests: Sequence[Request]
    ) -> tuple[Tensor, Cache]:
        """`_read` of a model that cannot continue a prefix: each prompt is read as a whole.

        An image is still encoded once for all its questions.
        """
        return _last(*self._hidden_whole(items, requests, [[] for _ in items]))

    def _hidden_whole(
        self,
        items: Sequence[_Question],
        requests: Sequence[Request],
        continuations: Sequence[list[int]],
    ) -> tuple[Tensor, Cache, Tensor]:
        """Hidden states (B, L, D), cache and lengths (B,) of prompts and what follows each."""
        keys = [item.shown for item in items]
        distinct = {item.shown: requests[item.index] for item in items if item.shown is not None}
        features, tiles = self._image_features(list(distinct.values()))
        counts = dict(zip(distinct, tiles, strict=True))
        if features is not None:
            sizes = [sum(of_one) for of_one in tiles]
            places = dict(zip(distinct, torch.arange(len(features)).split(sizes), strict=True))
            features = features[torch.cat([places[key] for key in keys if key is not None])]
        prefixes = [
            [] if item.shown is None else self.processor.encode(item.prefix, counts[item.shown])
            for item in items
        ]
        prompts = [
            prefix + item.suffix + more
            for prefix, item, more in zip(prefixes, items, continuations, strict=True)
        ]
        ids, lengths = _right_pad(prompts, self.model)
        self.tokens["prefill"] += int(lengths.sum())
        with self._timed("prefill"):
            embeds, _ = self.model.embed(ids, image_features=features)
            hidden, cache = self.model.language_model(embeds, None, lengths)
        return hidden, cache, lengths

    def _image_features(self, requests: Sequence[Request]) -> tuple[Tensor | None, list[list[int]]]:
        """Of all tiles of these requests, one after the other: (tiles, P, Dv) or None.

        And of each request the number of tiles of each of its pictures.
        """
        pictures = [picture for request in requests for picture in request.pictures]
        if not pictures:
            return None, [[] for _ in requests]
        if self.stand_in is not None:
            counts = [1] * len(pictures)
            features = self.stand_in.expand(len(pictures), -1, -1)
        else:
            with self._timed("encode"):
                images = [picture() if callable(picture) else picture for picture in pictures]
                pixels, counts = self._pixels(images)
                features = self.model.encode_images(pixels.to(self.model.device))
        of_each = iter(counts)
        return features, [list(islice(of_each, len(request.pictures))) for request in requests]

    def _pixels(self, images: Sequence[Image.Image | Tiles]) -> tuple[Tensor, list[int]]:
        """Pixels of all tiles, and how many each picture has; what is ready stays as it is."""
        if not any(isinstance(image, Tiles) for image in images):
            return self.processor.tiled(images)
        ready = [i if isinstance(i, Tiles) else Tiles.of(i, self.processor) for i in images]
        return torch.cat([one.pixels for one in ready]), [len(one.pixels) for one in ready]

    def _longest(self, prefix: str) -> int:
        """Tokens of a prefix whose pictures have as many tiles as the layout may give."""
        most = 1 if self.stand_in is not None else self.processor.most_tiles
        return len(self.processor.encode(prefix, [most] * prefix.count(IMAGE)))

    def _read(self, state: Cache, suffixes: list[list[int]]) -> tuple[Tensor, Cache]:
        """Each row's suffix read: the last hidden states (B, D), and the states behind it."""
        return _last(*self._hidden(state, suffixes))

    def _hidden(self, state: Cache, texts: list[list[int]]) -> tuple[Tensor, Cache, Tensor]:
        """Hidden states (B, L, D), state and lengths (B,) of token rows behind a state."""
        ids, lengths = _right_pad(texts, self.model)
        self.tokens["prefill"] += int(lengths.sum())
        with self._timed("prefill"):
            embeds = self.model.language_model.embed(ids, state.pictured)
            hidden, state = self.model.language_model(embeds, state, lengths)
        return hidden, state, lengths

    def _decoded(
        self,
        alike: Sequence[Sequence[_Question]],
        requests: Sequence[Request],
        last: Tensor,
        state: Cache,
        max_new_tokens: int,
        batch_size: int,
    ) -> Iterator[tuple[list[_Question], list[list[int]]]]:
        """(items, their answers' tokens), `batch_size` at a time.

        Row n of last and state is what all items of alike[n] start from.
        """
        items = [(row, item) for row, same in enumerate(alike) for item in same]
        for some in chunks(items, batch_size):
            batch = [item for _, item in some]
            hidden, own = last, state
            if len(items) > len(alike):  # more than one answer of a row: each has its own copy
                rows = torch.tensor([row for row, _ in some], device=last.device)
                hidden, own = last[rows], state.select(rows)
            with self._timed("decode"):
                if self.temperature:
                    seeds = [requests[item.index].seed for item in batch]
                    choose = Sampler(self.temperature, seeds)
                    outputs = decode(self.model, hidden, own, max_new_tokens, choose)
                else:
                    outputs = greedy(self.model, hidden, own, max_new_tokens)
            self.tokens["decode"] += sum(map(len, outputs))
            yield batch, outputs


class Sampler:
    """Draws tokens from softmax(logits / temperature), each row by random numbers of its own seed.

    One uniform number a token, inverted through the cumulated probabilities in order of token ids,
    in float64: what a row draws depends on nothing but its logits, its seed and its place.
    """

    def __init__(self, temperature: float, seeds: Sequence[str]) -> None:
        self.temperature = temperature
        self._numbers = [random.Random(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Tokens (B,) for logits (B, vocabulary) of the rows with these numbers."""
        likely = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.tensor([[self._numbers[row].random()] for row in rows], dtype=torch.float64)
        return torch.searchsorted(likely, drawn.to(likely.device) * likely[:, -1:], right=True)[
            :, 0
        ]


def end_tokens(model: VLMambaForConditionalGeneration) -> frozenset[int]:
    """The tokens that end an answer, the same as in generate(); there may be several or none."""
    ends = model.generation_config.eos_token_id
    ends = model.config.eos_token_id if ends is None else ends
    if ends is None or isinstance(ends, int):
        ends = [] if ends is None else [ends]
    return frozenset(ends)


def greedy(
    model: VLMambaForConditionalGeneration, hidden: Tensor, state: Cache, max_new_tokens: int
) -> list[list[int]]:
    """`decode` that always takes the most likely token."""
    return decode(model, hidden, state, max_new_tokens, lambda logits, _: logits.argmax(dim=-1))


def decode(
    model: VLMambaForConditionalGeneration,
    hidden: Tensor,
    state: Cache,
    max_new_tokens: int,
    choose: Callable[[Tensor, Sequence[int]], Tensor],
) -> list[list[int]]:
    """Decoding from the last hidden states (B, D); rows leave as they end.

    choose: logits (B, vocabulary) and the numbers of the rows they are of -> tokens (B,).
    `state` is consumed.  Returns each row's tokens, the end token left out.
    """
    outputs: list[list[int]] = [[] for _ in range(hidden.shape[0])]
    alive = list(range(hidden.shape[0]))
    language_model, ends = model.language_model, end_tokens(model)
    for produced in range(max_new_tokens):
        tokens = choose(language_model.head(hidden), alive)
        values = tokens.tolist()
        going = [row for row, value in enumerate(values) if value not in ends]
        for row in going:
            outputs[alive[row]].append(values[row])
        if not going or produced + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=tokens.device)
            alive, state, tokens = [alive[r] for r in going], state.select(rows), tokens[rows]
        hidden = language_model.step(language_model.embed(tokens, state.pictured), state)
    return outputs


@dataclass(frozen=True)
class _Question:
    index: int
    prefix: str  # up to and with the last image
    suffix: list[int]  # the tokens of the rest
    shown: str | int | None  # of its images the key, without one their request's index; None: none


def _alike(group: Sequence[_Question]) -> list[list[_Question]]:
    """Questions of one prefix that ask the same, together; in order of first appearance."""
    found: dict[tuple[int, ...], list[_Question]] = {}
    for question in group:
        found.setdefault(tuple(question.suffix), []).append(question)
    return list(found.values())


def _apart(group: Sequence[_Question]) -> list[list[_Question]]:
    """Every question by itself: what comes behind it differs."""
    return [[question] for question in group]


def _check(request: Request, number: int) -> None:
    """Raise UserError where a request's tags and its picture disagree, or its text is missing."""
    try:
        check_tags(request.prompt.count(IMAGE), len(request.pictures))
        if not request.prompt:
            raise UserError("the prompt is empty; expected a question")
        if request.prompt.endswith(IMAGE):
            raise UserError("the prompt ends with an image; expected a question behind it")
    except UserError as error:
        raise UserError(f"request {number}: {error}") from error


def _by_prefix(requests: Sequence[Request], processor: VLMambaProcessor) -> dict:
    """Requests that share image and prefix, in order of first appearance."""
    groups: dict[tuple, list[_Question]] = {}
    for index, request in enumerate(requests):
        if request.suffix is None:
            prefix, suffix = _split(request.prompt, processor)
        else:
            prefix, suffix = split_text(request.prompt)[0], list(request.suffix)
        own = index if request.image_key is None else request.image_key
        shown = own if request.pictures else None
        groups.setdefault((shown, prefix), []).append(_Question(index, prefix, suffix, shown))
    return groups


def _split(prompt: str, processor: VLMambaProcessor) -> tuple[str, list[int]]:
    """A prompt up to and with its last image, and the tokens of the rest."""
    prefix, suffix = split_text(prompt)
    tokens = processor.continuation if prefix else processor.encode
    return prefix, tokens(suffix)


def _last(hidden: Tensor, state: Cache, lengths: Tensor) -> tuple[Tensor, Cache]:
    """Of hidden states (B, L, D) each row's last one, (B, D); the state as it is."""
    return hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1], state


def _right_pad(
    sequences: Sequence[Sequence[int]], model: VLMambaForConditionalGeneration
) -> tuple[Tensor, Tensor]:
    """Token ids (B, longest) and lengths (B,) on the model's device."""
    lengths = torch.tensor([len(s) for s in sequences], device=model.device)
    ids = torch.full((len(sequences), int(lengths.max())), model.config.pad_token_id or 0)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids.to(model.device), lengths
