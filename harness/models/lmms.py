"""lmms-eval's model class around any of ours.

    lmms-eval --model vlmamba --model_args pretrained=nano --include_path tasks \\
        --tasks vlmamba_pope --batch_size 16 --device cpu

`lmms_rows` turns what lmms-eval asks into requests; everything else is the model's, and
`resumable`'s around it.  Processes of `accelerate launch` are lmms-eval's to join.

Not all of this is a public interface of lmms-eval: `tests/test_lmms_eval.py` names what is used and
fails where it is no longer there, and the files that use it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger

from harness.models.base import Request, likelihood
from harness.models.lmms_rows import ChatRows, Rows, loss
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
    kind_of_rows = Rows

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
        self.answers = Resumable(model)
        self.rows = self.kind_of_rows(lambda: self.task_dict, seed)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of `requests`; UNREADABLE where there is none."""
        votes: Counter[int] = Counter()  # an instance comes as often as answers are wanted to it

        def of(place: int) -> Request:
            vote = votes[id(requests[place])]
            votes[id(requests[place])] += 1
            return replace(self.rows.request(requests[place]), vote=vote)

        return [UNREADABLE if text is None else text for text in self._ask_all(requests, of)]

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """(mean cross-entropy of the continuation's tokens, whether it is greedy), wrapped.

        A loss in spite of the name: lmms-eval chooses the choice with the least
        (`ConfigurableTask.process_results`), as all of its own models return one.  It takes the
        first choice of a row that is UNLIKELY throughout.  In a GenerationResult, because
        lmms-eval makes a text of anything else that is no text, a pair too; its --use_cache (0.7.3)
        does the same, so that no model can be asked this with it.
        """
        found = self._ask_all(requests, lambda place: self.rows.scored(requests[place]))
        losses = [UNLIKELY if not text else loss(*likelihood(text)) for text in found]
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
        request, row.answers, row.note = self.rows.round(
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
        places, asked, odd, ended = [], [], [], 0
        for place, instance in enumerate(requests):
            if _is_padding(instance):
                continue
            try:
                request = of(place)
            except Exception as error:  # a task's own code raises whatever a row makes it
                odd.append(_where(instance) + one_line(str(error) or type(error).__name__))
                answers[place] = None
                continue
            if request is None:  # its task has no further round
                ended += 1
            else:
                places.append(place)
                asked.append(request)
        for line in odd:
            self.answers.note(line)
        if len(odd) >= ODD_TO_GIVE_UP and not asked and not ended:
            raise UserError(f"none of the {len(odd)} rows can be asked; {odd[0]}")
        for place, answer in zip(places, self.answers.answer(asked), strict=True):
            answers[place] = answer
        if missing := answers.count(None):
            logger.warning(
                f"vlmamba: {missing} of {len(requests)} requests have no answer; "
                + "; ".join(self.answers.events[-3:])
            )
        return answers


class VLMambaChat(VLMamba):
    """The same model, asked by chat messages."""

    is_simple = False
    kind_of_rows = ChatRows


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


def _batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"batch size is {value!r}; expected a whole number of at least 1")
    return size
