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
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteriaList,
)

from harness.models import ranks, templates
from harness.models.base import (
    LOGLIKELIHOOD,
    SAMPLING,
    TURNS,
    EvalModel,
    Limits,
    OnDone,
    Picture,
    Request,
    Sampling,
    likelihood_text,
)
from harness.models.code import plain_config, processor_sha256
from harness.models.forced import log_probability
from harness.models.registry import ModelOptions
from harness.models.resumable import is_out_of_memory
from harness.models.shared_prefix import (
    ALONE,
    BATCHED,
    EQUAL,
    GREEDY,
    Prefix,
    Prompt,
    SharedPrefix,
)
from harness.models.transformers_batches import (
    DECODE,
    NOT_TAKEN,
    READING,
    FirstToken,
    Stops,
    Waiting,
    why_not,
)
from harness.models.vlmamba import choose_device, choose_dtype
from vlmamba.processing import tokens_behind
from vlmamba.weight_files import weights_sha256
from vlmamba_core.errors import UserError, one_line

AGREEMENT = 8  # questions of the run that are also asked one by one
MODES = (BATCHED, EQUAL, ALONE)
PROCESSOR = "processor"  # of the parts of its time
# What generate() would do besides taking the most likely token and penalising repetition
OTHER_RULES = (
    *("no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "sequence_bias"),
    *("exponential_decay_length_penalty", "guidance_scale", "encoder_repetition_penalty"),
    *("encoder_no_repeat_ngram_size", "watermarking_config", "stop_strings", "max_time"),
    *("prompt_lookup_num_tokens", "remove_invalid_values", "cache_implementation"),
)


def load(name: str, options: ModelOptions) -> EvalModel:
    """The model in a folder or on the hub. Raises UserError."""
    options.refuse("hf", "backend", "blind", "quantize")
    return TransformersModel(
        name,
        batch_size=options.batch_size,
        device=ranks.device(options.device),
        dtype=options.dtype,
        revision=options.revision,
        template=options.template,
        temperature=options.temperature,
        seed=options.seed,
    )


class TransformersModel(EvalModel):
    """Answers of a transformers VLM, greedy unless `temperature` is above 0. Raises UserError.

    template: see `harness.models.templates.choose`.  mode: one of MODES, or None for the fastest
    that is exact.  agreement: questions of the run that are also asked one by one.
    """

    offers = frozenset((SAMPLING, TURNS, LOGLIKELIHOOD))

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
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.name, self.batch_size = pretrained, batch_size
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.model, self.processor = _load(pretrained, self.dtype, revision)
        self.model.to(self.device).eval()
        self.template = templates.choose(self.processor, template)
        if not self.template.chat:
            self.offers = self.offers - {TURNS}  # such a template has room for one question
        self.temperature, self.seed = temperature, seed
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.seconds: dict[str, float] = dict.fromkeys((PROCESSOR, READING, DECODE), 0.0)
        self.decoder = SharedPrefix(self.model)
        self.reasons: list[str] = []  # why not a faster mode
        self.error: float | None = None
        self.mode = mode or self._choose_mode()
        if self.reasons:  # a run that is slower than it might be says why
            self.notes = (f"questions are answered {self.mode}: {'; '.join(self.reasons)}",)
        self.also_alone = 0 if self.mode == ALONE or temperature else agreement
        self.depends_on_batch = self.mode != ALONE
        self._kept_images: dict[str, Any] | None = None
        self.beyond: set[tuple[str, int]] = set()  # questions longer than its positions
        self._keep_image_processing()

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of the weights."""
        return weights_sha256(self.model)

    def provenance(self) -> dict[str, Any]:
        """Weights, template, device, numeric type, batching and library versions."""
        drawn = {"temperature": self.temperature, "seed": self.seed} if self.temperature else {}
        return drawn | {
            "model_sha256": self.sha256,
            "processor_sha256": processor_sha256(self.processor, self.model.generation_config),
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
            **({"questions_beyond_its_positions": len(self.beyond)} if self.beyond else {}),
            "batching": {
                "mode": self.mode,
                "why_not_faster": self.reasons,
                "logits_error": self.error,
                "questions_also_asked_alone": self.agreement.asked,
                "of_these_answered_differently": self.agreement.different,
            },
            "config": plain_config(self.model.config) | {"_name_or_path": self.name},
        }

    @torch.inference_mode()
    def answer(
        self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        """Answers; requests of the same pictures share their prefill.

        Likelihoods, and answers whose request says how tokens are chosen, are made one by one.
        """
        if limits.sampling is not None or any(r.continuation is not None for r in requests):
            self._answer_by_generate(requests, on_done)
            return
        groups: dict[str | None, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.image_key, []).append(index)
        waiting = Waiting(self, limits, batch_size, on_done)
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
        tags = 0 if self._places_pictures else len(request.pictures)
        text = self.template.render(self.processor, question, tags, request.before)
        bos = self.processor.tokenizer.bos_token
        # what a processor adds on its own is its affair, but not a second opening token
        opened = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        images = [picture.image.convert("RGB") for picture in request.pictures]
        inputs = self.processor(
            text=[text],
            images=[images] if images else None,
            return_tensors="pt",
            **opened,
        ).to(self.device, self.dtype)
        found = {name: value for name, value in inputs.items() if name != "labels"}
        self._look_at_length(request, found["input_ids"].shape[1])
        return Prompt(found, self._shared_tokens(found["input_ids"][0]) if images else 0)

    def _look_at_length(self, request: Request, tokens: int) -> None:
        """Count a question that goes beyond the positions that the model was made for."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(most, int) or tokens + request.limits.max_new_tokens <= most:
            return
        if not self.beyond:
            print(
                f"note: {request.task} row {request.row + 1} has {tokens} tokens, with its answer "
                f"more than the {most} positions of {self.name}; answers to such may be worse",
                file=sys.stderr,
            )
        self.beyond.add((request.task, request.row))

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

    def alone(self, prompt: Prompt, limits: Limits, how: Mapping[str, Any] = GREEDY) -> list[int]:
        """The tokens of the library's own generate() for one prompt."""
        first = FirstToken(self._now)
        criteria = StoppingCriteriaList([first])
        if limits.until:
            criteria.append(Stops(self, first, limits.until))
        started = self._now()
        output = self.model.generate(
            **prompt.inputs,
            **how,
            max_new_tokens=limits.max_new_tokens,
            stopping_criteria=criteria,
        )
        ended = self._now()
        self.seconds[READING] += (first.at or ended) - started
        self.seconds[DECODE] += ended - (first.at or ended)
        return output[0, first.begin :].tolist()

    def _answer_by_generate(self, requests: Sequence[Request], on_done: OnDone) -> None:
        for index, request in enumerate(requests):
            try:
                with self.timed(PROCESSOR):
                    prompt = self.prompt(request)
                if request.continuation is None:
                    answer = self.text(self._drawn(prompt, request))
                else:
                    ids = tokens_behind(self.processor.tokenizer, request.continuation)
                    with self.timed(READING):
                        found = log_probability(self.model, prompt.inputs, ids)
                    answer = likelihood_text(*found)
            except NOT_TAKEN as error:
                on_done(index, None, why_not(error))
                continue
            on_done(index, answer)

    def _greedy(self, prompt: Prompt, request: Request) -> list[int]:
        return self.alone(prompt, request.limits)

    def _drawn(self, prompt: Prompt, request: Request) -> list[int]:
        """The tokens of one sampled answer; the random generators outside are left as they were."""
        plain = Sampling(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0)
        sampling = request.limits.sampling or replace(plain, seed=self.seed)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(request.seed(sampling.seed))
            return self.alone(prompt, request.limits, sampling.settings())

    def generate_tokens(self, request: Request, new_tokens: int) -> int:
        """Decode exactly `new_tokens` for one request, past any end token; returns their number."""
        prompt = self.prompt(request)
        self.model.generate(
            **prompt.inputs, **GREEDY, max_new_tokens=new_tokens, min_new_tokens=new_tokens
        )
        return new_tokens

    @functools.cached_property
    def _places_pictures(self) -> bool:
        """Whether image tokens come from the processor alone, whatever the prompt says."""
        return not self.template.chat and templates.places_pictures(self.processor)

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
        waiting: Waiting,
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
                        alone = self._drawn if self.temperature else self._greedy
                        answer = self.text(alone(prompt, requests[index]))
                    else:
                        shared = prompt.ids[: prompt.shared]
                        if prefix is None or first is None or not torch.equal(first, shared):
                            with self.timed(READING):
                                prefix, first = self.decoder.prefill(prompt), shared
                except NOT_TAKEN as error:
                    on_done(index, None, why_not(error))
                    continue
                if prefix is None:  # one by one
                    on_done(index, answer)
                else:
                    waiting.add(index, prompt, prefix, requests[index].seed(self.seed))

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
            for question in ("Is there a dog?", "What color is the larger one of the two?"):
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
        """Within `_same_images` a picture is resized and normalized once for all its questions."""
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
