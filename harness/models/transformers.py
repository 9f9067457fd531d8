"""Any image-text-to-text model of transformers under evaluation: `--model hf:FOLDER_OR_ID`.

    model = TransformersModel("llava-hf/llava-1.5-7b-hf", batch_size=16, dtype="bfloat16")

Prompts are made by the model's own processor and chat template (or a named template).  Answers are
greedy and are those of the library's generate() for one prompt at a time: when the model is
loaded, shared image prefixes in padded batches are compared with it, and where they are not the
same computation the model goes one by one and the record says why.  A few of the run's own
questions are then asked both ways, and the record says how many answers agreed.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from harness.models import ranks, templates
from harness.models.base import EvalModel, Limits, OnDone, Picture, Request
from harness.models.registry import ModelOptions
from harness.models.resumable import is_out_of_memory
from harness.models.shared_prefix import (
    ALONE,
    BATCHED,
    EQUAL,
    GREEDY,
    Batch,
    Prefix,
    Prompt,
    SharedPrefix,
    batch_key,
)
from harness.models.vlmamba import choose_device, choose_dtype
from vlmamba.weight_files import weights_sha256
from vlmamba_core.errors import UserError, one_line

AGREEMENT = 8  # questions of the run that are also asked one by one
MODES = (BATCHED, EQUAL, ALONE)
# Where its time goes: a library's model encodes pictures within the forward that reads the prompt
PROCESSOR, READING, DECODE = "processor", "encode_prefill", "decode"
# What generate() would do besides taking the most likely token and penalising repetition
OTHER_RULES = (
    *("no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    *("exponential_decay_length_penalty", "guidance_scale", "encoder_repetition_penalty"),
    *("encoder_no_repeat_ngram_size", "watermarking_config", "stop_strings", "max_time"),
    *("prompt_lookup_num_tokens", "remove_invalid_values", "cache_implementation"),
)
# What a processor raises for a request that this model does not take
NOT_TAKEN = (ValueError, TypeError, IndexError, KeyError)


def load(name: str, options: ModelOptions) -> EvalModel:
    """The model in a folder or on the hub. Raises UserError."""
    options.refuse("hf", "backend", "blind", "temperature")
    return TransformersModel(
        name,
        batch_size=options.batch_size,
        device=ranks.device(options.device),
        dtype=options.dtype,
        revision=options.revision,
        template=options.template,
    )


class TransformersModel(EvalModel):
    """Greedy answers of a transformers VLM. Raises UserError for what cannot be loaded.

    template: see `harness.models.templates.choose`.  mode: one of MODES, or None for the fastest
    that is exact.  agreement: questions of the run that are also asked one by one.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int = 32,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        template: str | None = None,
        mode: str | None = None,
        agreement: int = AGREEMENT,
    ) -> None:
        self.name, self.batch_size = pretrained, batch_size
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.model, self.processor = _load(pretrained, self.dtype, revision)
        self.model.to(self.device).eval()
        self.template = templates.choose(self.processor, template)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.seconds: dict[str, float] = dict.fromkeys((PROCESSOR, READING, DECODE), 0.0)
        self.decoder = SharedPrefix(self.model)
        self.reasons: list[str] = []  # why not a faster mode
        self.error: float | None = None
        self.mode = mode or self._choose_mode()
        if self.reasons:  # a run that is slower than it might be says why
            self.notes = (f"questions are answered {self.mode}: {'; '.join(self.reasons)}",)
        self.also_alone = 0 if self.mode == ALONE else agreement
        self._kept_images: dict[str, Any] | None = None
        self._keep_image_processing()

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of the weights."""
        return weights_sha256(self.model)

    def provenance(self) -> dict[str, Any]:
        """Weights, template, device, numeric type, batching and library versions."""
        return {
            "model_sha256": self.sha256,
            "template": self.template.describe(),
            "device": self.device.type,
            "dtype": str(self.dtype),
            "batching": self.mode,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def describe(self) -> dict[str, Any]:
        """Digest, size, configuration, template, and how exactly questions were batched."""
        return {
            "sha256": self.sha256,
            "parameters": self.parameters,
            "template": self.template.describe(),
            "batching": {
                "mode": self.mode,
                "why_not_faster": self.reasons,
                "logits_error": self.error,
                "questions_also_asked_alone": self.agreement.asked,
                "of_these_answered_differently": self.agreement.different,
            },
            "config": self.model.config.to_dict() | {"_name_or_path": self.name},
        }

    @torch.inference_mode()
    def answer(
        self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        """Greedy answers; requests of the same pictures share their prefill."""
        groups: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.image_key, []).append(index)
        waiting = _Waiting(self, limits, batch_size, on_done)
        for same in groups.values():
            self._answer_same_pictures(requests, same, limits, waiting, on_done)
        waiting.flush()

    @torch.inference_mode()
    def answer_alone(self, request: Request) -> str:
        """By the library's own generate(), whatever the mode."""
        return self.text(self.alone(self.prompt(request), request.limits))

    def prompt(self, request: Request) -> Prompt:
        """What the model reads. Raises one of NOT_TAKEN for a request that it does not take."""
        token = templates.image_token(self.processor)
        question = request.prompt.replace(token, "")  # a question cannot bring pictures along
        text = self.template.render(self.processor, question, len(request.pictures))
        bos = self.processor.tokenizer.bos_token
        images = [picture.image.convert("RGB") for picture in request.pictures]
        inputs = self.processor(
            text=[text],
            images=[images] if images else None,
            return_tensors="pt",
            add_special_tokens=not (bos and text.startswith(bos)),
        ).to(self.device, self.dtype)
        found = {name: value for name, value in inputs.items() if name != "labels"}
        return Prompt(found, self._shared_tokens(found["input_ids"][0]) if images else 0)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `seconds`, a GPU's queued work included."""
        started = self._now()
        try:
            yield
        finally:
            self.seconds[part] += self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer's tokens say."""
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)

    def alone(self, prompt: Prompt, limits: Limits) -> list[int]:
        """The tokens of the library's own greedy generate() for one prompt."""
        first = _FirstToken(self._now)
        criteria = StoppingCriteriaList([first])
        if limits.until:
            criteria.append(_Stops(self, len(prompt.ids), limits.until))
        started = self._now()
        output = self.model.generate(
            **prompt.inputs,
            **GREEDY,
            max_new_tokens=limits.max_new_tokens,
            stopping_criteria=criteria,
        )
        ended = self._now()
        self.seconds[READING] += (first.at or ended) - started
        self.seconds[DECODE] += ended - (first.at or ended)
        start = 0 if self.model.config.is_encoder_decoder else len(prompt.ids)
        return output[0, start:].tolist()

    def generate_tokens(self, request: Request, new_tokens: int) -> int:
        """Decode exactly `new_tokens` for one request, past any end token; returns their number."""
        prompt = self.prompt(request)
        self.model.generate(
            **prompt.inputs, **GREEDY, max_new_tokens=new_tokens, min_new_tokens=new_tokens
        )
        return new_tokens

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)

    def _answer_same_pictures(
        self,
        requests: Sequence[Request],
        same: Sequence[int],
        limits: Limits,
        waiting: _Waiting,
        on_done: OnDone,
    ) -> None:
        """Put the questions about one set of pictures into batches, or answer them one by one."""
        prefix: Prefix | None = None
        first: Tensor | None = None
        with self._same_images():
            for index in same:
                try:
                    with self.timed(PROCESSOR):
                        prompt = self.prompt(requests[index])
                    if self.mode == ALONE:
                        on_done(index, self.text(self.alone(prompt, limits)))
                        continue
                    shared = prompt.ids[: prompt.shared]
                    if prefix is None or first is None or not torch.equal(first, shared):
                        with self.timed(READING):
                            prefix, first = self.decoder.prefill(prompt), shared
                except NOT_TAKEN as error:
                    on_done(index, None, f"{type(error).__name__}: {one_line(str(error))[:300]}")
                    continue
                waiting.add(index, prompt, prefix)

    def _shared_tokens(self, ids: Tensor) -> int:
        """How many tokens stand up to the last image token; 0 where there is none."""
        config = self.model.config
        token = getattr(config, "image_token_id", None)
        token = getattr(config, "image_token_index", None) if token is None else token
        if token is None:
            return 0
        places = (ids == token).nonzero()
        return int(places[-1]) + 1 if len(places) else 0

    def _choose_mode(self) -> str:
        """The fastest way that computes what one prompt alone computes, by a comparison."""
        settings = self.model.generation_config
        rules = [name for name in OTHER_RULES if getattr(settings, name, None)]
        if rules:
            self.reasons.append(f"its generation settings have {', '.join(rules)}")
            return ALONE
        if self.model.config.is_encoder_decoder:
            self.reasons.append("it has an encoder that reads the question too")
            return ALONE
        for mode in (BATCHED, EQUAL):
            try:
                measured = self._compare(mode)
            except Exception as error:  # whatever a model's code does with a continued cache
                if is_out_of_memory(error):
                    raise
                self.reasons.append(f"{mode}: {type(error).__name__}: {one_line(str(error))[:200]}")
                continue
            self.error = measured
            if measured is not None:
                return mode
        return ALONE

    @torch.inference_mode()
    def _compare(self, mode: str) -> float | None:
        """The logits' error under `mode` on small prompts; None where it is not exact."""
        prompts, same = [], []
        for number, size in enumerate(((64, 48), (40, 88))):
            picture = Picture(str(number), functools.partial(_test_picture, size))
            for question in ("Is there a dog?", "What colour is the larger one of the two?"):
                request = Request("check", 0, question, (picture,), Limits(1))
                prompts.append(self.prompt(request))
                same.append(number)
        found = [self.decoder.compare(prompts, same, mode == EQUAL)]
        with contextlib.suppress(*NOT_TAKEN):  # some models take no question without a picture
            texts = [
                self.prompt(Request("check", 0, question, (), Limits(1)))
                for question in ("Yes or no?", "How many legs has a dog?")
            ]
            found.append(self.decoder.compare(texts, [0, 0], mode == EQUAL))
        worst = max(found, key=lambda comparison: comparison.error)
        if worst.exact:
            return worst.error
        self.reasons.append(
            f"{mode}: logits differ by {worst.error:.2g} of the largest from those of a prompt "
            f"alone ({worst.tolerance:.2g} is allowed)"
        )
        return None

    def _keep_image_processing(self) -> None:
        """Within `_same_images` a picture is resized and normalised once for all its questions."""
        process = self.processor.image_processor.preprocess

        @functools.wraps(process)
        def once(images: Any, *args: Any, **kwargs: Any) -> Any:
            if self._kept_images is None:
                return process(images, *args, **kwargs)
            key = repr((args, sorted(kwargs.items())))
            if key not in self._kept_images:
                self._kept_images[key] = process(images, *args, **kwargs)
            kept = self._kept_images[key]
            return type(kept)(dict(kept))  # processors take entries out of it

        self.processor.image_processor.preprocess = once

    @contextlib.contextmanager
    def _same_images(self) -> Iterator[None]:
        """All requests inside are about the same pictures."""
        self._kept_images = {}
        try:
            yield
        finally:
            self._kept_images = None


class _Waiting:
    """Questions that wait until a batch of them is full."""

    def __init__(
        self, model: TransformersModel, limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        self._model, self._limits, self._size, self._on_done = model, limits, batch_size, on_done
        self._rows: dict[Any, list[tuple[int, Prompt, Prefix]]] = {}

    def add(self, index: int, prompt: Prompt, prefix: Prefix) -> None:
        """Decode a batch where this question fills one."""
        key = batch_key(self._model.mode, prefix, prompt)
        rows = self._rows.setdefault(key, [])
        rows.append((index, prompt, prefix))
        if len(rows) >= self._size:
            self._decode(self._rows.pop(key))
        elif len({id(row[2]) for rows in self._rows.values() for row in rows}) > self._size:
            fullest = max(self._rows, key=lambda key: len(self._rows[key]))
            self._decode(self._rows.pop(fullest))

    def flush(self) -> None:
        """Decode what is left."""
        while self._rows:
            self._decode(self._rows.pop(next(iter(self._rows))))

    def _decode(self, rows: list[tuple[int, Prompt, Prefix]]) -> None:
        """Greedy tokens of a batch; rows that have ended leave it once half of them have."""
        model = self._model
        with model.timed(READING):
            batch = model.decoder.start([r[2] for r in rows], [r[1].question for r in rows])
        alive = list(range(len(rows)))  # the row of each place in the batch
        tokens: list[list[int]] = [[] for _ in rows]
        ended: set[int] = set()
        while True:
            with model.timed(DECODE):
                chosen = self._most_likely(batch, [(rows[r][1], tokens[r]) for r in alive])
            for place, row in enumerate(alive):
                if row in ended:
                    continue
                tokens[row].append(chosen[place])
                if self._is_end(tokens[row]):
                    ended.add(row)
                    self._on_done(rows[row][0], model.text(tokens[row]))
            if len(ended) == len(rows):
                return
            going = [place for place, row in enumerate(alive) if row not in ended]
            with model.timed(DECODE):
                if 2 * len(going) <= len(alive):
                    batch.select(torch.tensor(going, device=model.device))
                    alive = [alive[place] for place in going]
                    chosen = [chosen[place] for place in going]
                batch.step(torch.tensor(chosen, device=model.device))

    def _most_likely(
        self, batch: Batch, sofar: Sequence[tuple[Prompt, Sequence[int]]]
    ) -> list[int]:
        logits = batch.logits
        penalty = self._model.model.generation_config.repetition_penalty
        if penalty not in (None, 1.0):
            penalise = RepetitionPenaltyLogitsProcessor(penalty)
            rows = []
            for place, (prompt, tokens) in enumerate(sofar):  # each without another's padding
                ids = torch.cat([prompt.ids, prompt.ids.new_tensor(tokens)])
                rows.append(penalise(ids[None], logits[place, None]))
            logits = torch.cat(rows)
        return logits.argmax(dim=-1).tolist()

    def _is_end(self, tokens: Sequence[int]) -> bool:
        """Whether an answer is complete: its end token, its limit, or a stop string."""
        if tokens[-1] in self._model.ends or len(tokens) >= self._limits.max_new_tokens:
            return True
        return _has_stop(self._model.text(tokens), self._limits.until)


class _FirstToken(StoppingCriteria):
    """Notes when generate() has its first token: what came before read the prompt."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        self.at = self._now() if self.at is None else self.at
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Stops(StoppingCriteria):
    """Ends generate() at a stop string."""

    def __init__(self, model: TransformersModel, prompt: int, until: Sequence[str]) -> None:
        self._model, self._prompt, self._until = model, prompt, until

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        texts = [self._model.text(row[self._prompt :].tolist()) for row in input_ids]
        ended = [_has_stop(text, self._until) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _has_stop(text: str, until: Sequence[str]) -> bool:
    whole = text.rstrip("\ufffd")  # a character whose last bytes are still to come
    return any(stop in whole for stop in until)


def _load(pretrained: str, dtype: torch.dtype, revision: str | None) -> tuple[Any, Any]:
    options = {"revision": revision} if revision else {}
    try:
        processor = AutoProcessor.from_pretrained(pretrained, **options)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"cannot load {pretrained!r} as an image-text-to-text model of transformers "
            f"{transformers.__version__}: {one_line(str(error))[:300]}"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(f"{pretrained!r} has no processor of images and text")
    return model, processor


def _test_picture(size: tuple[int, int]) -> Image.Image:
    """A picture with something in it, the same every time."""
    width, height = size
    image = Image.new("RGB", size)
    image.putdata(
        [(5 * x % 256, 7 * y % 256, 3 * x * y % 256) for y in range(height) for x in range(width)]
    )
    return image
