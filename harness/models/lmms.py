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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import lmms_eval.api.metrics  # noqa: F401 - registers the metrics that task files name
import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from loguru import logger
from PIL import Image

from harness.data.images import UnreadableImage, decode, image_key, is_stored
from harness.models.base import Limits, Picture, Request, Sampling, Turn, likelihood
from harness.models.registry import ModelOptions, eval_models
from harness.models.resumable import Resumable
from vlmamba_core.errors import UserError, one_line

UNREADABLE = "\ue000unreadable image\ue000"  # instead of an answer; no tokenizer writes it
UNLIKELY = (math.inf, False)  # instead of a loss
ODD_TO_GIVE_UP = 10  # rows that cannot be asked, and not one that can: the fault is not a row's


class VLMamba(lmms):
    """Answers of what `--model` of `harness.run` names: a VL-Mamba checkpoint, for one.

    A row that cannot be asked or answered is counted and said at the end; its answer is UNREADABLE
    (UNLIKELY for a likelihood).  Raises UserError for unusable arguments.
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
        seed: int = 0,  # of sampled answers
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
            seed=seed,
        )
        model = eval_models.load(pretrained, options)
        self.device = model.device or torch.device("cpu")  # lmms-eval gathers there
        self.batch_size = model.batch_size
        self.seed = seed
        self.answers = Resumable(model)
        self._visuals = functools.lru_cache(maxsize=1)(self._read_visuals)  # of one row, n pictures
        self._tables: dict[tuple[str, str], Any] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of `requests`; UNREADABLE where there is none."""
        votes: Counter[int] = Counter()  # an instance comes as often as answers are wanted to it

        def of(place: int) -> Request:
            vote = votes[id(requests[place])]
            votes[id(requests[place])] += 1
            return replace(self._request(requests[place]), vote=vote)

        return [UNREADABLE if text is None else text for text in self._ask_all(requests, of)]

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """(mean cross-entropy of the continuation's tokens, whether it is greedy), wrapped.

        A loss in spite of the name: lmms-eval chooses the choice with the least
        (`ConfigurableTask.process_results`), as all of its own models return one.  It takes the
        first choice of a row that is UNLIKELY throughout.  In a GenerationResult, because
        lmms-eval makes a text of anything else that is no text, a pair too; its --use_cache (0.7.3)
        does the same, so that no model can be asked this with it.
        """
        found = self._ask_all(requests, lambda place: self._scored(requests[place]))
        losses = [UNLIKELY if not text else _loss(*likelihood(text)) for text in found]
        return [GenerationResult(loss) for loss in losses]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Each row's answers, by round; the task makes a round's question of those before it.

        Rounds are asked for all rows together.
        """
        rows = [_Rounds(going=not _is_padding(instance)) for instance in requests]
        number = 0
        while going := [place for place, row in enumerate(rows) if row.going]:
            some = [requests[place] for place in going]
            of = functools.partial(self._next_round, number, some, [rows[n] for n in going])
            for place, text in zip(going, self._ask_all(some, of), strict=True):
                rows[place].hear(text)
            number += 1
        return [row.answers for row in rows]

    def _next_round(
        self, number: int, instances: Sequence[Instance], rows: Sequence[_Rounds], place: int
    ) -> Request | None:
        """The request of a row's next round; None where the task ends it."""
        row = rows[place]
        request, row.answers, row.note = self._round(
            instances[place], number, row.answers, row.note
        )
        row.going = request is not None
        return request

    def _ask_all(
        self, requests: Sequence[Instance], of: Callable[[int], Request | None]
    ) -> list[str | None]:
        """What the model says to each instance, None where it is odd; "" where nothing is asked.

        of: the request at a place; None where nothing is to be asked, as of padding.
        """
        answers: list[str | None] = [""] * len(requests)
        places, asked, odd = [], [], []
        for place, instance in enumerate(requests):
            if _is_padding(instance):
                continue
            try:
                request = of(place)
            except Exception as error:  # a task's own code raises whatever a row makes it
                odd.append(_where(instance) + one_line(str(error) or type(error).__name__))
                answers[place] = None
                continue
            if request is not None:
                places.append(place)
                asked.append(request)
        for line in odd:
            self.answers.note(line)
        if len(odd) >= ODD_TO_GIVE_UP and not asked:
            raise UserError(f"none of the {len(odd)} rows can be asked; {odd[0]}")
        for place, answer in zip(places, self.answers.answer(asked), strict=True):
            answers[place] = answer
        if missing := answers.count(None):
            logger.warning(
                f"vlmamba: {missing} of {len(requests)} requests have no answer; "
                + "; ".join(self.answers.events[-3:])
            )
        return answers

    def _request(self, instance: Instance) -> Request:
        """The request of lmms-eval's instance of one round."""
        context, generation, doc_to_visual, doc_id, task, split = instance.args
        asked = self._question(context, doc_to_visual, doc_id, task, split)
        return replace(asked, limits=self._limits(generation))

    def _scored(self, instance: Instance) -> Request:
        """The request of an instance that asks how likely a continuation is."""
        if len(instance.args) == 2:  # of the continuation alone, for mutual information
            return replace(_text_request(*instance.args), task=str(instance.metadata.get("task")))
        context, continuation, doc_to_visual, doc_id, task, split = instance.args
        if callable(continuation):
            continuation = continuation(self._doc(task, split, doc_id))
        asked = self._question(context, doc_to_visual, doc_id, task, split)
        return replace(asked, continuation=_text(continuation))

    def _round(
        self, instance: Instance, number: int, before: list[str], note: Any
    ) -> tuple[Request | None, list[str], Any]:
        """A round's request (None: the task ends it), the answers before it, the task's note."""
        context, generation, doc_to_visual, doc_to_text, doc_id, task, split = instance.args
        visuals = self._visuals(doc_to_visual, doc_id, task, split) if number == 0 else []
        if number:
            visuals, context, ends, before, note = doc_to_text(
                self._doc(task, split, doc_id),
                previous_output=list(before),
                round_idx=number,
                previous_round_info=note,
            )
            if ends:
                return None, list(before), note
        asked = self._shown(context, visuals or [], doc_id, task)
        return replace(asked, limits=self._limits(generation)), list(before), note

    def _question(
        self, context: Any, doc_to_visual: Callable, doc_id: int, task: str, split: str
    ) -> Request:
        """The request to a row, whose pictures are read again when they are shown.

        A data set's images do not fit in memory: only their keys are kept.
        """
        visuals = self._visuals(doc_to_visual, doc_id, task, split)

        def read(place: int) -> Image.Image:
            return self._visuals(doc_to_visual, doc_id, task, split)[place]

        asked = self._shown(context, visuals, doc_id, task)
        pictures = tuple(
            Picture(picture.key, functools.partial(read, place))
            for place, picture in enumerate(asked.pictures)
        )
        return replace(asked, pictures=pictures)

    def _shown(self, context: Any, visuals: Sequence[Any], doc_id: int, task: str) -> Request:
        """The request of a text and its decoded pictures, which it holds."""
        pictures = []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise TypeError(f"a {type(visual).__name__} among what is shown; expected pictures")
            pictures.append(Picture(image_key(visual), functools.partial(_itself, visual)))
        return Request(task, doc_id, _text(context), tuple(pictures), Limits(1))

    def _read_visuals(
        self, doc_to_visual: Callable, doc_id: int, task: str, split: str
    ) -> list[Any]:
        """What a row shows. Raises UnreadableImage where that is a broken picture."""
        broken: list[UnreadableImage] = []
        doc = self._doc(task, split, doc_id, broken)
        try:
            return list(doc_to_visual(doc) or [])
        except Exception as error:
            if broken:  # it met the picture that could not be decoded
                raise broken[0] from error
            raise

    def _doc(
        self, task: str, split: str, doc_id: int, broken: list[UnreadableImage] | None = None
    ) -> dict[str, Any]:
        """A row with its pictures decoded; those that cannot be stay as they are stored."""
        if (task, split) not in self._tables:
            self._tables[task, split] = _undecoded(self.task_dict[task][split])
        row = self._tables[task, split][doc_id]
        broken = [] if broken is None else broken
        return {name: _decoded(value, broken) for name, value in row.items()}

    def _limits(self, generation: Mapping[str, Any]) -> Limits:
        until = generation.get("until") or []
        return Limits(
            max_new_tokens=int(generation.get("max_new_tokens") or 128),
            until=(until,) if isinstance(until, str) else tuple(until),
            sampling=sampling(generation, self.seed),
        )


class VLMambaChat(VLMamba):
    """The same model, asked by chat messages (`doc_to_messages`): with turns of its own before.

    The pictures of a turn are shown before its text, as in training.
    """

    is_simple = False

    def _request(self, instance: Instance) -> Request:
        _, doc_to_messages, generation, doc_id, task, split = instance.args
        messages = self._messages(doc_to_messages, doc_id, task, split)
        asked = self._asked(messages, doc_id, task)

        def read(place: int) -> Image.Image:
            again = self._messages(doc_to_messages, doc_id, task, split)
            return self._asked(again, doc_id, task).pictures[place].image

        pictures = tuple(
            Picture(picture.key, functools.partial(read, place))
            for place, picture in enumerate(asked.pictures)
        )
        return replace(asked, pictures=pictures, limits=self._limits(generation))

    def _round(
        self, instance: Instance, number: int, before: list[str], note: Any
    ) -> tuple[Request | None, list[str], Any]:
        _, doc_to_messages, generation, doc_id, task, split = instance.args
        doc = self._doc(task, split, doc_id)
        messages = doc_to_messages(doc) if number == 0 else None
        if number:
            told = doc_to_messages(
                doc, round_idx=number, previous_output=list(before), previous_round_info=note
            )
            if not (isinstance(told, tuple) and len(told) == 4):
                return None, before, note  # the task has one round
            messages, ends, before, note = told
            if ends:
                return None, list(before), note
        asked = self._asked(messages, doc_id, task)
        return replace(asked, limits=self._limits(generation)), list(before), note

    def _messages(self, doc_to_messages: Callable, doc_id: int, task: str, split: str) -> Any:
        return self._visuals(doc_to_messages, doc_id, task, split)

    def _asked(self, messages: Any, doc_id: int, task: str) -> Request:
        """The request of chat messages, the last of which is the user's."""
        *before, last = [_turn(message) for message in messages]
        if last[0].role != "user":
            raise ValueError(f"the last message is the {last[0].role}'s; expected the user's")
        visuals = [visual for _, shown in (*before, last) for visual in shown]
        asked = self._shown(last[0].text, visuals, doc_id, task)
        return replace(asked, before=tuple(turn for turn, _ in before))


def sampling(generation: Mapping[str, Any], seed: int) -> Sampling | None:
    """How a task's generation_kwargs choose tokens; None: greedily.

    As in transformers, `do_sample` decides where it is given; a temperature of 0 is greedy.
    """
    temperature, drawn = generation.get("temperature"), generation.get("do_sample")
    if drawn is None:
        drawn = (temperature or 0) > 0
    elif temperature is not None and temperature <= 0:
        drawn = False
    beams = int(generation.get("num_beams") or 1)
    if not drawn:
        return Sampling(num_beams=beams, seed=seed) if beams > 1 else None
    values = {name: generation.get(name) for name in ("temperature", "top_p", "top_k")}
    return Sampling(do_sample=True, num_beams=beams, seed=seed, **values)


def _loss(log_probability: float, tokens: int, is_greedy: bool) -> tuple[float, bool]:
    return -log_probability / max(tokens, 1), is_greedy


def _turn(message: Mapping[str, Any]) -> tuple[Turn, list[Any]]:
    """A chat message as a turn, and what it shows."""
    parts = message["content"]
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    texts = [part["text"] for part in parts if part["type"] == "text"]
    shown = [part["url"] for part in parts if part["type"] != "text"]
    return Turn(message["role"], "\n".join(text for text in texts if text), len(shown)), shown


def _text_request(context: Any, continuation: Any) -> Request:
    return Request("", 0, _text(context), (), Limits(1), continuation=_text(continuation))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} in place of a text")
    return value


@dataclass
class _Rounds:
    """A row of several rounds: the answers so far, and what its task keeps in mind."""

    going: bool
    answers: list[str] = field(default_factory=list)
    note: Any = None

    def hear(self, text: str | None) -> None:
        """Take a round's answer; a row without one ends."""
        if self.going:
            self.answers = [*self.answers, UNREADABLE if text is None else text]
            self.going = text is not None


def _is_padding(instance: Instance) -> bool:
    """Whether an instance is there to even out the ranks: lmms-eval drops its answer."""
    return bool(instance.metadata.get("__padding_only__"))


def _where(instance: Instance) -> str:
    """ "TASK: row N: ", as far as an instance tells."""
    told = instance.metadata
    row = told.get("doc_id")
    return f"{told.get('task')}: " + (f"row {row + 1}: " if isinstance(row, int) else "")


def _itself(image: Image.Image) -> Image.Image:
    return image


def _undecoded(rows: Any) -> Any:
    """A `datasets.Dataset` whose pictures come as they are stored; anything else as it is."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    for column, kind in rows.features.items():
        several = isinstance(kind, datasets.List | datasets.LargeList)
        if isinstance(kind.feature if several else kind, datasets.Image):
            stored = datasets.Image(decode=False)
            rows = rows.cast_column(column, datasets.List(stored) if several else stored)
    return rows


def _decoded(value: Any, broken: list[UnreadableImage]) -> Any:
    if isinstance(value, list):
        return [_decoded(one, broken) for one in value]
    if not is_stored(value):
        return value
    try:
        return decode(value)
    except UnreadableImage as error:
        broken.append(error)
        return value


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
