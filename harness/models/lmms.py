"""All that is lmms-eval's: its model class around ours, and its own tasks as a check of scores.

    lmms-eval --model vlmamba --model_args pretrained=nano --include_path tasks \\
        --tasks vlmamba_pope --batch_size 16 --device cpu

`VLMamba` turns what lmms-eval asks into `harness.models.base` requests; everything else is the
model's, and `resumable`'s around it.  Processes of `accelerate launch` are lmms-eval's to join.
`OwnTask` is a task of lmms-eval's own over rows that are already loaded, for
`harness.scoring.official`.

Not all of this is a public interface of lmms-eval: `tests/test_lmms_eval.py` names what is used and
fails where it is no longer there.  No other file of the harness imports lmms-eval, but for the
manifest of the model.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import lmms_eval.api.metrics  # noqa: F401 - registers the metrics that task files name
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from PIL import Image

from harness.data.images import UnreadableImage, decode, image_key, is_stored
from harness.models.base import Limits, Picture, Request
from harness.models.registry import ModelOptions, eval_models
from harness.models.resumable import Resumable
from vlmamba_core.errors import UserError

UNREADABLE = "\ue000unreadable image\ue000"  # instead of an answer; no tokenizer writes it


class VLMamba(lmms):
    """Greedy answers of what `--model` of `harness.run` names: a VL-Mamba checkpoint, for one.

    Raises UserError for unusable arguments.
    """

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
    ) -> None:
        super().__init__()
        options = ModelOptions(
            batch_size=_batch_size(batch_size),
            device=device,
            dtype=dtype,
            backend=backend,
            blind=blind,
            revision=revision,
        )
        model = eval_models.load(pretrained, options)
        self.device = model.device or torch.device("cpu")  # lmms-eval gathers there
        self.batch_size = model.batch_size
        self.answers = Resumable(model)

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
            return None

        def read(place: int) -> Image.Image:
            # the row is read again: a data set's images do not fit in memory
            whole = self.task_dict[task][split][doc_id]
            whole = {k: decode(v) if is_stored(v) else v for k, v in whole.items()}
            return doc_to_visual(whole)[place]

        until = generation.get("until") or []
        return Request(
            task=task,
            row=doc_id,
            prompt=context,
            pictures=tuple(
                Picture(key, functools.partial(read, place)) for place, key in enumerate(keys)
            ),
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


class OwnTask(ConfigurableTask):
    """A task of lmms-eval's own, over rows that are already loaded.

    file: its task file, below lmms-eval's `tasks`.
    """

    def __init__(self, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = datasets.Dataset.from_list(list(rows[:1]))  # what its class looks at
        path = Path(str(files("lmms_eval"))) / "tasks" / file
        super().__init__(config=load_yaml_config(str(path), mode="full"), model_name="vlmamba")

    def download(self, dataset_kwargs: dict | None = None) -> None:
        """lmms-eval's hook for getting the data."""
        self.dataset = datasets.DatasetDict({self.config.test_split: self._rows})
        self.dataset_no_image = self.dataset

    def results(self, row: Mapping[str, Any], answer: str) -> Mapping[str, Any]:
        """What `process_results` makes of one answer."""
        # Their decorator tries five times, with seconds between, what can only fail again.
        return inspect.unwrap(type(self).process_results)(self, row, [answer])

    def value(self, metric: str, results: Iterable[Mapping[str, Any]]) -> float:
        """The metric of what `results` gave; NaN where no row says anything about it."""
        items = [result[metric] for result in results if metric in result]
        if not items:
            return math.nan
        aggregate = self.aggregation()[metric]
        if "args" not in inspect.signature(aggregate).parameters:
            return float(aggregate(items))
        with tempfile.TemporaryDirectory() as folder:  # it writes a submission file
            return float(aggregate(items, args=argparse.Namespace(output_path=folder)))
