"""What lmms-eval asks about a row, as a request to any model: `harness.models.base.Request`.

    rows = Rows(lambda: {"ai2d": {"test": dataset}})
    request = rows.request(instance)        # of lmms-eval's generate_until
    request = rows.scored(instance)         # of its loglikelihood

Its pictures are decoded when they are shown, not before: a data set's do not fit in memory.  What a
task's own code raises over an odd row is raised here too; the caller counts it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
from lmms_eval.api.instance import Instance
from PIL import Image

from harness.data.images import UnreadableImage, decode, image_key, is_stored
from harness.models.base import Limits, Picture, Request, Sampling, Turn

USUAL_LENGTH = 1024  # where a task sets none: what most of lmms-eval's models take then


class Rows:
    """The rows of lmms-eval's tasks. task_dict: gives task -> split -> its rows.

    seed: of sampled answers.
    """

    def __init__(self, task_dict: Callable[[], Mapping[str, Any]], seed: int = 0) -> None:
        self._task_dict, self._seed = task_dict, seed
        self._visuals = functools.lru_cache(maxsize=1)(self._read_visuals)  # of one row, n pictures
        self._tables: dict[tuple[str, str], Any] = {}

    def request(self, instance: Instance) -> Request:
        """The request of lmms-eval's instance of one round."""
        context, generation, doc_to_visual, doc_id, task, split = instance.args
        asked = self._question(context, doc_to_visual, doc_id, task, split)
        return replace(asked, limits=self._limits(generation))

    def scored(self, instance: Instance) -> Request:
        """The request of an instance that asks how likely a continuation is."""
        if len(instance.args) == 2:  # of the continuation alone, for mutual information
            return replace(_text_request(*instance.args), task=str(instance.metadata.get("task")))
        context, continuation, doc_to_visual, doc_id, task, split = instance.args
        if callable(continuation):
            continuation = continuation(self._doc(task, split, doc_id))
        asked = self._question(context, doc_to_visual, doc_id, task, split)
        return replace(asked, continuation=_text(continuation))

    def round(
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
            if is_stored(visual):
                decode(visual)  # says why it could not be
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
            self._tables[task, split] = undecoded(self._task_dict()[task][split])
        row = self._tables[task, split][doc_id]
        broken = [] if broken is None else broken
        return {name: decoded(value, broken) for name, value in row.items()}

    def _limits(self, generation: Mapping[str, Any]) -> Limits:
        until = generation.get("until") or []
        length = generation.get("max_new_tokens")
        return Limits(
            max_new_tokens=int(length or USUAL_LENGTH),
            until=(until,) if isinstance(until, str) else tuple(until),
            sampling=sampling(generation, self._seed),
            unset=not length,
        )


class ChatRows(Rows):
    """Of tasks that give chat messages (`doc_to_messages`), with turns of the model's own before.

    The pictures of a turn are shown before its text, as in training.
    """

    def request(self, instance: Instance) -> Request:
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

    def round(
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


def _turn(message: Mapping[str, Any]) -> tuple[Turn, list[Any]]:
    """A chat message as a turn, and what it shows."""
    parts = message["content"]
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    texts = [_text(part["text"]) for part in parts if part["type"] == "text"]
    shown = [part["url"] for part in parts if part["type"] != "text"]
    return Turn(message["role"], "\n".join(text for text in texts if text), len(shown)), shown


def _text_request(context: Any, continuation: Any) -> Request:
    return Request("", 0, _text(context), (), Limits(1), continuation=_text(continuation))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} in place of a text")
    return value


def _itself(image: Image.Image) -> Image.Image:
    return image


def loss(log_probability: float, tokens: int, is_greedy: bool) -> tuple[float, bool]:
    """What lmms-eval takes for a likelihood: the mean cross-entropy, and whether it is greedy."""
    return -log_probability / max(tokens, 1), is_greedy


def image_columns(rows: datasets.Dataset) -> list[str]:
    """The columns that hold a picture, or a list of them."""

    def holds_pictures(kind: Any) -> bool:
        several = isinstance(kind, datasets.List | datasets.LargeList)
        return isinstance(kind.feature if several else kind, datasets.Image)

    return [column for column, kind in rows.features.items() if holds_pictures(kind)]


def undecoded(rows: Any) -> Any:
    """A `datasets.Dataset` whose pictures come as they are stored; anything else as it is."""
    return with_pictures(rows, datasets.Image(decode=False))


def with_pictures(rows: Any, kind: datasets.Image) -> Any:
    """The rows with every picture of this kind; no `datasets.Dataset` stays as it is."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    for column in image_columns(rows):
        several = not isinstance(rows.features[column], datasets.Image)
        rows = rows.cast_column(column, datasets.List(kind) if several else kind)
    return rows


def decoded(value: Any, broken: list[UnreadableImage]) -> Any:
    if isinstance(value, list):
        return [decoded(one, broken) for one in value]
    if not is_stored(value):
        return value
    try:
        return decode(value)
    except UnreadableImage as error:
        broken.append(error)
        return value
