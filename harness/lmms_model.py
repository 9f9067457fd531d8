"""VL-Mamba as an lmms-eval model: answers all requests, image by image.

Used by `harness.run`, and by lmms-eval's own command once the package is installed:

    lmms-eval --model vlmamba --model_args pretrained=nano --include_path tasks \\
        --tasks vlmamba_pope --batch_size 16 --device cpu

Requests are sorted so that the questions of one image (equal content) stand together: the image
is encoded and read by the language model once. Answers return in the order of the requests.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from harness import ranks
from harness.images import UnreadableImage, decode, image_key, is_stored
from harness.rundir import AnswerJournal, digest
from tasks.errors import UserError, unknown
from vlmamba import checkpoints
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.models.selective_scan import BACKENDS, resolve_backend, use_backend
from vlmamba.processing import IMAGE

UNREADABLE = "\ue000unreadable image\ue000"  # instead of an answer; no tokenizer writes it
NO_IMAGE = "none"
BATCHES_AHEAD = 4  # images are decoded for this many batches of questions at a time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Question:
    """One request: where it came from, what is asked, and which image it is about."""

    position: int
    task: str
    split: str
    doc_id: int
    prompt: str
    image_key: str
    max_new_tokens: int
    until: tuple[str, ...]
    doc_to_visual: Any = field(repr=False, compare=False)


Keep = Callable[[Question, str], None]


class VLMamba(lmms):
    """Greedy answers of a VL-Mamba checkpoint. Raises UserError for unusable arguments."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "nano",
        batch_size: int | str = 16,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        blind: bool = False,
        revision: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it to every model; not used
        journal: AnswerJournal | None = None,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        self.blind = blind
        self.device = _device(device)
        self._join_ranks()
        self.dtype = _dtype(dtype, self.device)
        self.batch_size = _batch_size(batch_size)
        self.backend = resolve_backend(backend, self.device)
        self.journal = journal
        self.model, self.processor = checkpoints.load(
            pretrained, dtype=self.dtype, device=self.device, revision=revision
        )
        # by the name that the user gave: where it lies on this machine is nobody's business
        self.config_dict = self.model.config.to_dict() | {"_name_or_path": pretrained}
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self._live_batch_size = self.batch_size
        self._blind_images: dict[str, str] = {}  # task -> digest of the images whose mean is seen
        self.terms: dict[str, Any] = {}  # whatever else an answer depends on, set by the harness
        self.events: list[str] = []  # what a record must tell: broken images, halved batches
        self.image_keys: dict[tuple[str, int], str] = {}  # (task, doc_id) -> content key
        self.timing = {"generate_s": 0.0, "questions": 0, "images": 0, "resumed_answers": 0}

    def _join_ranks(self) -> None:
        """Under `accelerate launch` or torchrun: this process's rank and its own GPU."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        if self.blind:
            raise UserError("a blind run needs every image of a task: run it in one process")
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self.device.type == "cuda" and self.device.index is None:
            self.device = self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of `requests`; UNREADABLE where the image cannot be decoded."""
        real = [i for i, r in enumerate(requests) if not r.metadata.get("__padding_only__")]
        questions = [self._question(i, requests[i]) for i in real]
        self.image_keys |= {(q.task, q.doc_id): q.image_key for q in questions}
        if self.blind:
            self._blind_images |= _images_by_task(questions)
        answers = [""] * len(requests)  # padding evens out the ranks; lmms-eval drops it
        open_questions = []
        for question in questions:
            kept = self._kept_answer(question)
            if question.image_key == UNREADABLE:
                answers[question.position] = UNREADABLE
            elif kept is None:
                open_questions.append(question)
            else:
                answers[question.position] = kept
                self.timing["resumed_answers"] += 1
        for question, answer in self._answers(open_questions, questions):
            answers[question.position] = answer
        self.timing["questions"] += len(open_questions)
        self.timing["images"] += len({(q.task, q.image_key) for q in open_questions})
        return answers

    def _answers(
        self, open_questions: Sequence[Question], questions: Sequence[Question]
    ) -> list[tuple[Question, str]]:
        """Answers of the open questions, under one progress bar over all of them."""
        started = time.perf_counter()
        answered: list[tuple[Question, str]] = []
        done = len(questions) - len(open_questions)
        hidden = self._rank != 0 or not open_questions
        with tqdm(total=len(questions), initial=done, unit="q", disable=hidden) as bar:

            def keep(question: Question, answer: str) -> None:
                answered.append((question, answer))
                if self.journal is not None and answer != UNREADABLE:
                    self.journal.add(self._key(question), answer)
                bar.update()

            try:
                for group in _by_terms(open_questions):
                    task = group[0].task
                    bar.set_description(task.removeprefix("vlmamba_").removesuffix("_lmms"))
                    self._answer(group, [q for q in questions if q.task == task], keep)
            finally:
                if self.journal is not None:
                    self.journal.flush()
        self.timing["generate_s"] += time.perf_counter() - started
        return answered

    def gather_notes(self) -> None:
        """After a run of several processes: the events and counts of all; all call it."""
        found = ranks.gather((self.events, self.timing))
        for events, _ in found:
            for event in events:
                self._note(event)
        for name in ("questions", "images", "resumed_answers"):
            self.timing[name] = sum(timing[name] for _, timing in found)
        self.timing["generate_s"] = max(timing["generate_s"] for _, timing in found)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: every task here is scored from generated text."""
        raise NotImplementedError("vlmamba answers generate_until tasks, not loglikelihood ones")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: the conversation template has one turn."""
        raise NotImplementedError("vlmamba answers single-round tasks, not multi-round ones")

    def _question(self, position: int, request: Instance) -> Question:
        context, generation, doc_to_visual, doc_id, task, split = request.args
        _check_greedy(generation, task)
        doc = self.task_dict[task][split][doc_id]
        stored = [value for value in doc.values() if is_stored(value)]
        try:
            keys = [image_key(v) for v in (stored or doc_to_visual(doc) or [])]
        except UnreadableImage as error:
            self._note(f"{task}: row {doc_id + 1}: {error}")
            keys = [UNREADABLE]
        if len(keys) > 1:
            raise UserError(f"{task}: row {doc_id + 1} has {len(keys)} images, vlmamba takes one")
        until = generation.get("until") or []
        return Question(
            position=position,
            task=task,
            split=split,
            doc_id=doc_id,
            prompt=context,
            image_key=keys[0] if keys else NO_IMAGE,
            max_new_tokens=int(generation.get("max_new_tokens", 128)),
            until=(until,) if isinstance(until, str) else tuple(until),
            doc_to_visual=doc_to_visual,
        )

    def _key(self, question: Question) -> str:
        """Key of an answer: all that it depends on."""
        return digest(
            [
                self.terms,
                self.batch_size,
                self._blind_images.get(question.task),
                question.task,
                question.doc_id,
                question.prompt,
                question.image_key,
                question.max_new_tokens,
                question.until,
            ]
        )

    def _kept_answer(self, question: Question) -> str | None:
        return self.journal.get(self._key(question)) if self.journal is not None else None

    @torch.inference_mode()
    def _answer(
        self, questions: Sequence[Question], of_task: Sequence[Question], keep: Keep
    ) -> None:
        """Answer questions of one task and length limit, some images at a time.

        `of_task` are all questions of the task: their images' mean is what a blind run sees.
        """
        features = self._blind_features(of_task) if self.blind else None
        generator = GroupedGenerator(self.model, self.processor, features)
        for group in _whole_images(questions, BATCHES_AHEAD * self.batch_size):
            images = self._images({q.image_key: q for q in group}.values())
            for question in group:
                if question.image_key not in images:
                    keep(question, UNREADABLE)
            self._generate(generator, [q for q in group if q.image_key in images], images, keep)

    def _generate(
        self,
        generator: GroupedGenerator,
        questions: Sequence[Question],
        images: Mapping[str, Image.Image | None],
        keep: Keep,
    ) -> None:
        """Generate; after running out of memory, go on with the rest at half the batch size."""
        done: set[int] = set()
        while left := [q for q in questions if q.position not in done]:

            def on_done(index: int, text: str, left: Sequence[Question] = left) -> None:
                done.add(left[index].position)
                keep(left[index], _cut(text, left[index].until))

            requests = [self._request(q, images[q.image_key]) for q in left]
            try:
                with use_backend(self.backend):
                    generator.generate(
                        requests, left[0].max_new_tokens, self._live_batch_size, on_done
                    )
            except (RuntimeError, MemoryError) as error:
                self._halve_batch(error)

    def _request(self, question: Question, image: Image.Image | None) -> Request:
        text = question.prompt.replace(IMAGE, "")  # a question cannot bring image tokens along
        if image is None:
            return Request(self.processor.conversation_prompt(text, images=0))
        key = "mean" if self.blind else question.image_key
        return Request(self.processor.conversation_prompt(text), key, image)

    def _halve_batch(self, error: BaseException) -> None:
        """Recover from running out of memory, or raise what went wrong."""
        if not _is_out_of_memory(error):
            raise error
        if self._live_batch_size == 1:
            raise UserError(
                f"out of memory at batch size 1 on {self.device}; use a smaller model, "
                "--dtype bfloat16 or another --device"
            ) from error
        self._live_batch_size //= 2
        self._note(f"out of memory: batch size halved to {self._live_batch_size}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note(self, event: str) -> None:
        if event not in self.events:
            self.events.append(event)

    def _images(self, questions: Iterable[Question]) -> dict[str, Image.Image | None]:
        """Decoded images by key; a broken one is left out, and None stands for no image."""
        images: dict[str, Image.Image | None] = {}
        for question in questions:
            doc = self.task_dict[question.task][question.split][question.doc_id]
            try:
                doc = {k: decode(v) if is_stored(v) else v for k, v in doc.items()}
            except UnreadableImage as error:
                self._note(f"{question.task}: row {question.doc_id + 1}: {error}")
                continue
            images[question.image_key] = next(iter(question.doc_to_visual(doc) or []), None)
        return images

    def _blind_features(self, questions: Sequence[Question]) -> Callable[[Tensor], Tensor]:
        """An encoder that has seen only the average image of the task: the text-only control.

        The mean is taken per patch over the task's distinct readable images, (1, P, Dv).
        """
        distinct = list({q.image_key: q for q in questions}.values())
        total, count = torch.zeros((), dtype=torch.float64), 0
        while distinct:
            some = distinct[: self._live_batch_size]
            images = [image for image in self._images(some).values() if image is not None]
            if images:
                try:
                    pixels = self.processor.pixel_values(images).to(self.device)
                    features = self.model.encode_images(pixels).double().cpu()
                except (RuntimeError, MemoryError) as error:
                    self._halve_batch(error)
                    continue
                total, count = total + features.sum(0, keepdim=True), count + len(images)
            distinct = distinct[len(some) :]
        mean = (total / max(count, 1)).to(self.device, self.dtype)
        return lambda pixel_values: mean.expand(len(pixel_values), -1, -1)


def model_sha256(model: torch.nn.Module) -> str:
    """A digest of every parameter and buffer by name: the same weights, whatever their origin."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _images_by_task(questions: Sequence[Question]) -> dict[str, str]:
    keys: dict[str, set[str]] = {}
    for question in questions:
        keys.setdefault(question.task, set()).add(question.image_key)
    return {task: digest(sorted(images)) for task, images in keys.items()}


def _by_terms(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Questions with the same task, length limit and stops, tasks in order of appearance."""
    groups: dict[tuple, list[Question]] = {}
    for q in questions:
        groups.setdefault((q.task, q.split, q.max_new_tokens, q.until), []).append(q)
    yield from groups.values()


def _whole_images(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of at least `size` questions that never part the questions of one image."""
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image_key, []).append(question)
    batch: list[Question] = []
    for same_image in by_image.values():
        batch += same_image
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _cut(text: str, until: Sequence[str]) -> str:
    """The answer before the first stop string, stripped (as the published scripts do)."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text.strip()


def _is_out_of_memory(error: BaseException) -> bool:
    kinds = torch.OutOfMemoryError | MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _check_greedy(generation: Mapping[str, Any], task: str) -> None:
    sampled = generation.get("do_sample") or (generation.get("temperature") or 0) > 0
    if sampled or (generation.get("num_beams") or 1) > 1:
        raise UserError(f"{task}: vlmamba decodes greedily; drop do_sample, temperature, num_beams")


def _device(name: str) -> torch.device:
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


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]


def _batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"batch size is {value!r}; expected a whole number of at least 1")
    return size
