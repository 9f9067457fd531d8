"""VL-Mamba checkpoints under evaluation: each image encoded and read once for all its questions.

    model = VLMambaModel("nano", batch_size=32)

Greedy, batched over images of equal limits; exact whatever the batch (vlmamba.generation).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from harness.data.images import UnreadableImage
from harness.models import DTYPES, ranks, templates
from harness.models.base import (
    LOGLIKELIHOOD,
    SAMPLING,
    TURNS,
    EvalModel,
    Limits,
    OnDone,
    Picture,
    Request,
    likelihood_text,
)
from harness.models.code import code_sha256, plain_config, processor_sha256
from harness.models.registry import ModelOptions
from vlmamba import checkpoints
from vlmamba.chat_template import CHAT_TEMPLATE
from vlmamba.generation import PARTS, GroupedGenerator, Tiles, prepared
from vlmamba.generation import Request as Question
from vlmamba.image_layouts import WHOLE
from vlmamba.models import products, quantized
from vlmamba.models.language import LanguageModel
from vlmamba.models.selective_scan import resolve_backend, use_backend
from vlmamba.weight_files import weights_sha256
from vlmamba_core import names
from vlmamba_core.errors import UserError
from vlmamba_core.folder import digest
from vlmamba_core.tokens import IMAGE, without_tags

MEAN_IMAGE = "mean"  # key of what a blind run sees instead of every image


def load(name: str, options: ModelOptions) -> EvalModel:
    """The checkpoint called `name` (bundled, a folder, or a hub id). Raises UserError."""
    if options.blind and ranks.several():
        raise UserError("a blind run needs every image of a task: run it in one process")
    return VLMambaModel(
        name,
        revision=options.revision,
        batch_size=options.batch_size,
        device=ranks.device(options.device),
        dtype=options.dtype,
        backend=options.backend,
        blind=options.blind,
        template=options.template,
        temperature=options.temperature,
        seed=options.seed,
        quantize=options.quantize,
    )


class VLMambaModel(EvalModel):
    """Answers of a VL-Mamba checkpoint, greedy unless `temperature` is above 0.

    Raises UserError for unusable arguments.

    template: in place of the checkpoint's own, see `harness.models.templates.choose`.
    """

    offers = frozenset((SAMPLING, TURNS, LOGLIKELIHOOD))

    def __init__(
        self,
        pretrained: str = "nano",
        *,
        batch_size: int = 32,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        blind: bool = False,
        revision: str | None = None,
        template: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        quantize: str | None = None,
    ) -> None:
        backend = names.choose("backend", backend, names.SCAN_BACKENDS)
        self.name, self.blind, self.batch_size = pretrained, blind, batch_size
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.backend = resolve_backend(backend, self.device)
        self.model, self.processor = checkpoints.load(
            pretrained, dtype=self.dtype, device=self.device, revision=revision
        )
        self._chosen = None if template is None else templates.choose(self.processor, template)
        if self._chosen is not None and not self._chosen.chat:
            self.offers = self.offers - {TURNS}  # such a template has room for one question
        self.temperature, self.seed = temperature, seed
        self.parameters = quantized.count_parameters(self.model)
        self.notes = reading_notes(self.model.language_model)
        self.quantize = quantize
        if quantize is not None:
            quantized.quantize(self.model.language_model, quantize)
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._stand_in: Tensor | None = None
        self._ready: dict[Request, Question] = {}  # prepared and not yet asked

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of the weights (see `weights_sha256`)."""
        return weights_sha256(self.model)

    def provenance(self) -> dict[str, Any]:
        """Weights, code, device, numeric type, kernel, library versions, how pictures are shown."""
        shown = {
            "image_aspect_ratio": self.processor.image_aspect_ratio,
            "image_layout": self.processor.image_layout,
        }
        rounded = {} if self.quantize is None else {"quantize": self.quantize}
        drawn = {"temperature": self.temperature, "seed": self.seed} if self.temperature else {}
        usual = {"image_aspect_ratio": "pad", "image_layout": WHOLE}  # of all older journals
        found: dict[str, Any] = {n: value for n, value in shown.items() if value != usual[n]}
        if self._chosen is not None:
            found["template"] = self._chosen.describe()
        elif self.processor.chat_template != CHAT_TEMPLATE:
            found["template"] = self.template.describe()
        return (
            found
            | drawn
            | rounded
            | {
                "model_sha256": self.sha256,
                "code_sha256": code_sha256(),
                "processor_sha256": processor_sha256(self.processor),
                "device": self.device.type,
                "dtype": str(self.dtype),
                "backend": self.backend,
                **self._products(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )

    def _products(self) -> dict[str, str]:
        """The library that multiplies on a CPU: a choice by measurement, which changes rounding."""
        if self.device.type != "cpu" or self.dtype not in products.DTYPES:
            return {}
        return {"products": products.chosen(self.dtype).library}

    def describe(self) -> dict[str, Any]:
        """Digest, size and configuration, under the name that the user gave."""
        config = plain_config(self.model.config) | {"_name_or_path": self.name}
        return {
            "sha256": self.sha256,
            "parameters": self.parameters,
            "template": self.template.describe(),
            "config": config,
        }

    @property
    def template(self) -> templates.Template:
        """What stands around a question: the chosen template, or the checkpoint's own."""
        if self._chosen is not None:
            return self._chosen
        usual = self.processor.chat_template == CHAT_TEMPLATE  # the words of this one
        return templates.choose(self.processor, "vicuna_v1" if usual else templates.CHAT)

    @torch.inference_mode()
    def begin_task(self, task: str, pictures: Sequence[Picture], batch_size: int) -> Any:
        """A blind run sees the mean of the task's images: a digest of them, else None."""
        if not self.blind:
            return None
        self._stand_in = self._mean_features(pictures, batch_size)
        return digest(sorted(picture.key for picture in pictures))

    def prepare(self, requests: Sequence[Request]) -> None:
        """Text to tokens, pictures to pixels; a blind run needs none of these."""
        if self.blind:
            return
        tiles: dict[str, Tiles] = {}
        for request in requests:
            self._ready[request] = prepared(self._question(request), self.processor, tiles)

    @torch.inference_mode()
    def answer(
        self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        """Answers and likelihoods; requests of one image share its prefill.

        What is drawn for an answer depends on the run's seed, its task, row and vote alone, or on
        the request where that says how tokens are chosen: such answers are made one by one.
        """
        generator = GroupedGenerator(
            self.model, self.processor, self._stand_in, temperature=self.temperature
        )
        made = [self._ready.pop(r) if r in self._ready else self._question(r) for r in requests]
        questions = [
            replace(question, seed=f"{self.seed}/{r.task}/{r.row}/{r.vote}")
            for question, r in zip(made, requests, strict=True)
        ]
        scored = [r.continuation for r in requests if r.continuation is not None]
        try:
            with use_backend(self.backend):
                if limits.sampling is not None:
                    for index, asked in enumerate(zip(questions, requests, strict=True)):
                        on_done(index, sampled(generator, *asked))
                elif scored:
                    generator.loglikelihood(
                        questions,
                        scored,
                        batch_size,
                        lambda index, *found: on_done(index, likelihood_text(*found)),
                    )
                else:
                    generator.generate(questions, limits.max_new_tokens, batch_size, on_done)
        finally:
            for part in PARTS:
                self.seconds[part] += generator.seconds[part]

    @torch.inference_mode()
    def generate_tokens(self, request: Request, new_tokens: int) -> int:
        """Decode exactly `new_tokens` for one request, by generate()."""
        question = self._question(request)
        inputs = self.processor(
            text=[question.prompt],
            images=[[picture.image for picture in request.pictures]] if request.pictures else None,
            return_tensors="pt",
        ).to(self.device)
        with use_backend(self.backend):
            generate: Any = self.model.generate
            generate(
                **inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
            )
        return new_tokens

    def _question(self, request: Request) -> Question:
        text = without_tags(request.prompt)  # a question cannot bring image tokens along
        if request.before:
            key = f"{len(request.pictures)} {MEAN_IMAGE}" if self.blind else request.image_key
            images = [picture.image for picture in request.pictures]
            prompt = self._conversation(request, text)
            return Question(prompt, key if images else None, images or None)
        if not request.pictures:
            return Question(self._prompt(text, 0))
        count = len(request.pictures)
        key = f"{count} {MEAN_IMAGE}" if self.blind else request.image_key
        images = [picture.image for picture in request.pictures]
        return Question(self._prompt(text, count), key, images)

    def _prompt(self, text: str, images: int) -> str:
        if self._chosen is None:
            return self.processor.conversation_prompt(text, images)
        return self._chosen.render(self.processor, text, images)

    def _conversation(self, request: Request, text: str) -> str:
        """The prompt of a question with turns before it, by the chat template."""
        messages = templates.messages(text, len(request.pictures), request.before, IMAGE)
        chosen = self._chosen.text if self._chosen is not None else None
        return self.processor.apply_chat_template(
            messages, chat_template=chosen, add_generation_prompt=True
        )

    def _mean_features(self, pictures: Sequence[Picture], batch_size: int) -> Tensor:
        """The mean per patch over the readable pictures' tiles, (1, P, Dv): text-only control."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for first in range(0, len(pictures), batch_size):
            images = []
            for picture in pictures[first : first + batch_size]:
                try:
                    images.append(picture.read())
                except UnreadableImage:
                    continue  # its questions are counted when they are asked
            if images:
                pixels = self.processor.pixel_values(images).to(self.device)
                features = self.model.encode_images(pixels).double().cpu()
                total, count = total + features.sum(0, keepdim=True), count + len(features)
        return (total / max(count, 1)).to(self.device, self.dtype)


def sampled(generator: GroupedGenerator, question: Question, request: Request) -> str:
    """One answer as the request's sampling says: an answer does not depend on its neighbors."""
    sampling = request.limits.sampling
    assert sampling is not None
    seed, length = request.seed(sampling.seed), request.limits.max_new_tokens
    return generator.sampled(question, length, seed, **sampling.settings())


def reading_notes(language_model: LanguageModel) -> tuple[str, ...]:
    """What cannot be done exactly with this language model, and is therefore not done.

    Both are measured on the loaded weights (`vlmamba.models.language.wrapped`).
    """
    family = language_model.config.model_type
    notes = []
    if not language_model.shares_prefix:
        notes.append(
            f"{family} cannot continue a prompt exactly in this version of transformers: the "
            "questions of an image share its features, but each reads its whole prompt anew"
        )
    if not language_model.batches:
        notes.append(
            f"{family} is not exact in batches in this version of transformers: the questions are "
            "answered one by one, whatever the batch size"
        )
    return tuple(notes)


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto: a GPU where there is one. Raises UserError."""
    name = name.casefold()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: this runs on cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The numeric type called `name`; auto: bfloat16 on a GPU, else float32. Raises UserError."""
    name = names.choose_dtype(name, ("auto", *DTYPES))
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
