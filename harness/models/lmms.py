"""VL-Mamba as an lmms-eval model class: lmms-eval's requests in, answers out.

Used by `harness.run`, and by lmms-eval's own command once the package is installed:

    lmms-eval --model vlmamba --model_args pretrained=nano --include_path tasks \\
        --tasks vlmamba_pope --batch_size 16 --device cpu

What lmms-eval asks is turned into `harness.models.base` requests; everything else is in
`resumable` and `vlmamba`. Answers return in the order of the requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from harness.data.images import UnreadableImage, decode, image_key, is_stored
from harness.models.base import Limits, Picture, Request
from harness.models.resumable import Resumable
from harness.models.vlmamba import VLMambaModel, choose_device
from vlmamba_core.errors import UserError
from vlmamba_core.folder import AnswerJournal

UNREADABLE = "\ue000unreadable image\ue000"  # instead of an answer; no tokenizer writes it
NO_IMAGE = "none"


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
        place = self._join_ranks(choose_device(device), blind)
        self.evaluated = VLMambaModel(
            pretrained,
            batch_size=_batch_size(batch_size),
            device=place,
            dtype=dtype,
            backend=backend,
            blind=blind,
            revision=revision,
        )
        self.device, self.batch_size = place, self.evaluated.batch_size
        self.answers = Resumable(self.evaluated, journal)
        self.image_keys: dict[tuple[str, int], str] = {}  # (task, doc_id) -> content key

    def _join_ranks(self, device: torch.device, blind: bool) -> torch.device:
        """Under `accelerate launch` or torchrun: this process's rank and its own GPU."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        if blind:
            raise UserError("a blind run needs every image of a task: run it in one process")
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        own = device.type == "cuda" and device.index is None
        return self.accelerator.device if own else device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of `requests`; UNREADABLE where the image cannot be decoded."""
        answers = [""] * len(requests)  # padding evens out the ranks; lmms-eval drops it
        places, asked = [], []
        for place, instance in enumerate(requests):
            if instance.metadata.get("__padding_only__"):
                continue
            request = self._request(instance)
            if request is None:
                answers[place] = UNREADABLE
            else:
                places.append(place)
                asked.append(request)
        for place, answer in zip(places, self.answers.answer(asked), strict=True):
            answers[place] = UNREADABLE if answer is None else answer
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: every task here is scored from generated text."""
        raise NotImplementedError("vlmamba answers generate_until tasks, not loglikelihood ones")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: the conversation template has one turn."""
        raise NotImplementedError("vlmamba answers single-round tasks, not multi-round ones")

    def _request(self, instance: Instance) -> Request | None:
        """The request of lmms-eval's instance; None where its image cannot be read at all."""
        context, generation, doc_to_visual, doc_id, task, split = instance.args
        _check_greedy(generation, task)
        doc = self.task_dict[task][split][doc_id]
        stored = [value for value in doc.values() if is_stored(value)]
        try:
            keys = [image_key(v) for v in (stored or doc_to_visual(doc) or [])]
        except UnreadableImage as error:
            self.answers.note(f"{task}: row {doc_id + 1}: {error}")
            self.image_keys[task, doc_id] = UNREADABLE
            return None
        if len(keys) > 1:
            raise UserError(f"{task}: row {doc_id + 1} has {len(keys)} images, vlmamba takes one")
        self.image_keys[task, doc_id] = keys[0] if keys else NO_IMAGE

        def read() -> Image.Image:
            # the row is read again: a data set's images do not fit in memory
            whole = self.task_dict[task][split][doc_id]
            whole = {k: decode(v) if is_stored(v) else v for k, v in whole.items()}
            return doc_to_visual(whole)[0]

        until = generation.get("until") or []
        return Request(
            task=task,
            row=doc_id,
            prompt=context,
            pictures=tuple(Picture(key, read) for key in keys),
            limits=Limits(
                max_new_tokens=int(generation.get("max_new_tokens", 128)),
                until=(until,) if isinstance(until, str) else tuple(until),
            ),
        )


def _check_greedy(generation: Mapping[str, Any], task: str) -> None:
    sampled = generation.get("do_sample") or (generation.get("temperature") or 0) > 0
    if sampled or (generation.get("num_beams") or 1) > 1:
        raise UserError(f"{task}: vlmamba decodes greedily; drop do_sample, temperature, num_beams")


def _batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"batch size is {value!r}; expected a whole number of at least 1")
    return size
