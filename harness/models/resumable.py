"""Around any model: answers kept as they come, broken images, batches that do not fit, timing.

    answers = Resumable(model, journal).answer(requests)

Requests of one task stand together, those of one image next to each other; images are decoded
for a few batches at a time, by a thread while the model computes where that is on an accelerator.
The answers come back in the order of the requests.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from harness.data.images import UnreadableImage
from harness.models import prefetch, ranks
from harness.models.base import LOGLIKELIHOOD, SAMPLING, EvalModel, Limits, Picture, Request
from vlmamba_core.errors import UserError, one_line
from vlmamba_core.folder import AnswerJournal, digest

BATCHES_AHEAD = 4  # images are decoded for this many batches of questions at a time
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
REFUSALS_TO_GIVE_UP = 10  # a model that takes none of so many questions takes none at all

Keep = Callable[[int, str | None], None]
Found = tuple[int, str | None]  # a request's place, and why its pictures cannot be decoded


class Resumable:
    """A model whose answers outlive the process.

    events: what a record must tell (broken images, halved batches).  timing: seconds of all
    answering and, within it, of waiting for decoded images and of the model: of its parts where it
    tells (`encode_s`, `prefill_s`, `decode_s`, ...), else all that it was waited for (`model_s`);
    of asking some questions also alone; questions and distinct images asked; answers that were
    already there.
    provenance: all that the answers depend on besides the requests (empty without a journal).
    """

    def __init__(self, model: EvalModel, journal: AnswerJournal | None = None) -> None:
        self.model, self.journal = model, journal
        self.events: list[str] = list(model.notes)
        self.timing: dict[str, Any] = {
            "generate_s": 0.0,
            "decode_images_s": 0.0,
            "questions": 0,
            "images": 0,
            "resumed_answers": 0,
        }
        self.timing |= {f"{part}_s": 0.0 for part in model.seconds or ("model",)}
        self.refused: dict[tuple[str, int], str] = {}  # (task, row) -> why it has no answer
        self.cost: dict[str, Any] = {}  # of one question, where it was measured
        self._batch_size = model.batch_size
        self._answered = 0
        self._seen: dict[str, Any] = {}  # what begin_task said of each task
        self._forecast: Forecast | None = None
        self.provenance = model.provenance() if journal is not None else {}

    def answer(self, requests: Sequence[Request]) -> list[str | None]:
        """Answers in the order of `requests`; None where an image cannot be decoded.

        None too where the model refuses a request. Raises UserError where it refuses all.
        """
        answers: list[str | None] = [None] * len(requests)
        try:
            self._answer_all(requests, answers)
            started = time.perf_counter()
            self._check_agreement(requests, answers)
            if self.model.also_alone:
                self.timing["alone_s"] = time.perf_counter() - started
        finally:
            if self.journal is not None:
                self.journal.flush()
        return answers

    def _answer_all(self, requests: Sequence[Request], answers: list[str | None]) -> None:
        """Fill in the answers, task by task."""
        started = time.perf_counter()
        before = dict(self.model.seconds)
        with tqdm(total=len(requests), unit="q", disable=ranks.rank() != 0) as bar:
            say = functools.partial(bar.write, file=sys.stderr)  # the results have stdout
            forecast = Forecast(len(requests), self._batch_size, say)
            self._forecast = forecast if not bar.disable else None

            def keep(index: int, text: str | None) -> None:
                answers[index] = text
                bar.update()
                forecast.done()

            for task, indices in _by(requests, lambda r: r.task).items():
                bar.set_description(task)
                self._answer_task(requests, indices, keep)
        self.timing["generate_s"] += time.perf_counter() - started
        for part, seconds in self.model.seconds.items():
            self.timing[f"{part}_s"] += seconds - before[part]

    def note(self, event: str) -> None:
        """Tell something in the record, once."""
        if event not in self.events:
            self.events.append(event)

    def gather(self) -> None:
        """After a run of several processes: the events and counts of all; all call it."""
        found = ranks.gather((self.events, self.timing, self.refused))
        for events, _, refused in found:
            self.refused |= refused
            for event in events:
                self.note(event)
        for name in ("questions", "images", "resumed_answers"):
            self.timing[name] = sum(timing[name] for _, timing, _ in found)
        for name in (name for name in self.timing if name.endswith("_s")):
            self.timing[name] = max(timing[name] for _, timing, _ in found)

    def _answer_task(self, requests: Sequence[Request], indices: list[int], keep: Keep) -> None:
        """All requests of one task: those already answered from the journal, then the others."""
        task = requests[indices[0]].task
        distinct = {p.key: p for i in indices for p in requests[i].pictures}
        seen = self._seen[task] = self._begin(task, list(distinct.values()))
        still_open = []
        for index in indices:
            if lacking := requests[index].needs - self.model.offers:
                self._refused(requests[index], f"{self.model.name} offers no {min(lacking)}")
                keep(index, None)
                continue
            key = self._key(requests[index], seen)
            kept = self.journal.get(key) if self.journal is not None else None
            if kept is None:
                still_open.append(index)
            else:
                keep(index, kept)
                self.timing["resumed_answers"] += 1
        self.timing["questions"] += sum(requests[i].vote == 0 for i in still_open)
        self.timing["images"] += len({requests[i].image_key for i in still_open})

        def done(index: int, text: str | None, reason: str) -> None:
            if text is None:
                self._refused(requests[index], reason)
                keep(index, None)
                return
            self._answered += 1
            if self._forecast is not None:
                self._forecast.answered()
            if requests[index].continuation is None:
                text = cut(text, requests[index].limits.until)
            if self.journal is not None:
                self.journal.add(self._key(requests[index], seen), text)
            keep(index, text)

        kinds = _by([requests[i] for i in still_open], lambda r: (r.limits, r.needs))
        for (limits, _), same in kinds.items():
            group = [still_open[place] for place in same]
            if self._forecast is not None:
                self._forecast.start()
            for some, found in self._decoded(requests, group):
                readable = self._noted(requests, found, keep)
                self._generate([(i, requests[i]) for i in readable], limits, done)
                for index in some:
                    for picture in requests[index].pictures:
                        picture.release()

    def _begin(self, task: str, pictures: list[Picture]) -> Any:
        while True:
            try:
                return self.model.begin_task(task, pictures, self._batch_size)
            except (RuntimeError, MemoryError) as error:
                self._halve_batch(error)

    def _key(self, request: Request, seen: Any) -> str:
        """Key of an answer: all that it depends on."""
        limits = request.limits
        return digest(
            [
                self.provenance,
                self.model.batch_size if self.model.depends_on_batch else None,
                seen,
                request.task,
                request.row,
                request.prompt,
                request.image_key,
                limits.max_new_tokens,
                limits.until,
                *([request.vote] if request.vote else []),
                *request.extras,
            ]
        )

    def _check_agreement(self, requests: Sequence[Request], answers: Sequence[str | None]) -> None:
        """Have the first answers made alone too, and count those that differ.

        They are kept as answers are: a run that is continued checks the same ones.
        """
        found = self.model.agreement
        for request, answer in zip(requests, answers, strict=True):
            if found.asked >= self.model.also_alone:
                return
            if answer is None or request.needs & {SAMPLING, LOGLIKELIHOOD}:
                continue  # `answer_alone` decodes greedily
            key = digest(["alone", self._key(request, self._seen[request.task])])
            alone = self.journal.get(key) if self.journal is not None else None
            if alone is None:
                try:
                    alone = cut(self.model.answer_alone(request), request.limits.until)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.note("out of memory: no more questions are also asked alone")
                    return
                if self.journal is not None:
                    self.journal.add(key, alone)
                for picture in request.pictures:
                    picture.release()
            found.asked += 1
            found.different += alone != answer

    def _decoded(
        self, requests: Sequence[Request], group: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Found]]]:
        """Some requests of a group at a time, and what came of decoding each one's pictures.

        The time that is waited for it counts: none where the model still computed meanwhile.
        """

        def work(some: list[int]) -> list[Found]:
            found = _decode(requests, some)
            if ahead:
                self.model.prepare([requests[i] for i, error in found if error is None])
            return found

        ahead = self.model.prefetches
        batches = _whole_images(requests, group, BATCHES_AHEAD * self._batch_size)
        turns = prefetch.in_turn(work, batches, ahead)
        while True:
            started = time.perf_counter()
            turn = next(turns, None)
            self.timing["decode_images_s"] += time.perf_counter() - started
            if turn is None:
                return
            yield turn

    def _noted(self, requests: Sequence[Request], found: Sequence[Found], keep: Keep) -> list[int]:
        """The requests whose pictures could all be decoded; others are noted and answered None."""
        for index, error in found:
            if error is not None:
                self.note(f"{requests[index].task}: row {requests[index].row + 1}: {error}")
                keep(index, None)
        return [index for index, error in found if error is None]

    def _generate(
        self,
        requests: Sequence[tuple[int, Request]],
        limits: Limits,
        done: Callable[[int, str | None, str], None],
    ) -> None:
        """Answer all; after running out of memory, go on with the rest at half the batch size."""
        answered: set[int] = set()
        kept_s = 0.0  # in this process, not by the model
        while left := [(index, r) for index, r in requests if index not in answered]:

            def on_done(
                index: int, text: str | None, reason: str = "", left: Sequence = left
            ) -> None:
                nonlocal kept_s
                began = time.perf_counter()
                answered.add(left[index][0])
                done(left[index][0], text, reason)
                kept_s += time.perf_counter() - began

            started, kept_s = time.perf_counter(), 0.0
            try:
                self.model.answer([r for _, r in left], limits, self._batch_size, on_done)
            except (RuntimeError, MemoryError) as error:
                self._halve_batch(error)
            else:
                if len(answered) < len(requests):
                    missing = len(requests) - len(answered)
                    raise UserError(f"model {self.model.name} left {missing} requests unanswered")
            finally:
                if not self.model.seconds:
                    self.timing["model_s"] += time.perf_counter() - started - kept_s

    def _refused(self, request: Request, reason: str) -> None:
        """Note a request without an answer; a model that refuses everything is an error."""
        self.refused[request.task, request.row] = f"not answered: {one_line(reason)}"
        self.note(f"{request.task}: row {request.row + 1}: not answered: {one_line(reason)}")
        refused, answered = len(self.refused), self._answered or self.timing["resumed_answers"]
        if refused >= REFUSALS_TO_GIVE_UP and not answered:
            raise UserError(
                f"model {self.model.name} answered none of the first {refused} questions: "
                f"{one_line(reason)}"
            )

    def _halve_batch(self, error: BaseException) -> None:
        """Recover from running out of memory, or raise what went wrong."""
        if not is_out_of_memory(error):
            raise error
        if self._batch_size == 1:
            raise UserError(
                "out of memory at batch size 1; use a smaller model, --dtype bfloat16 or another "
                "--device"
            ) from error
        self._batch_size //= 2
        self.note(f"out of memory: batch size halved to {self._batch_size}")
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Forecast:
    """Says once, after the first batch that the model itself has answered, how long the rest takes.

    `say` gets the line.  Answers of an earlier run, which take no time, are left out of the rate.
    """

    def __init__(self, total: int, batch_size: int, say: Callable[[str], object]) -> None:
        self._left, self._wanted = total, batch_size
        self._say: Callable[[str], object] | None = say
        self._answered, self._started = 0, 0.0

    def start(self) -> None:
        """The model is about to be asked: the clock runs from the first of these calls on."""
        self._started = self._started or time.perf_counter()

    def answered(self) -> None:
        """The model has answered one more question; `done` is to follow."""
        self._answered += 1

    def done(self) -> None:
        """One question less to go."""
        self._left -= 1
        if self._answered >= self._wanted and self._left > 0 and self._say:
            rate = self._answered / max(time.perf_counter() - self._started, 1e-9)
            say, self._say = self._say, None
            say(f"about {duration(self._left / rate)} for {self._left} more questions")


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _decode(requests: Sequence[Request], some: Sequence[int]) -> list[Found]:
    """What came of decoding each request's pictures; equal ones share one decoded image."""
    decoded: dict[str, Picture] = {}
    found: list[Found] = []
    for index in some:
        try:
            for picture in requests[index].pictures:
                picture.share(decoded.setdefault(picture.key, picture))
        except UnreadableImage as error:
            found.append((index, str(error)))
        else:
            found.append((index, None))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help; every fault of a GPU is an AcceleratorError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def cut(text: str, until: Sequence[str]) -> str:
    """The answer before the first stop string, stripped (as the published scripts do)."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text.strip()


def _by(requests: Sequence[Request], key: Callable[[Request], Any]) -> dict[Any, list[int]]:
    """Places by key, in order of appearance."""
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(key(request), []).append(place)
    return groups


def _whole_images(
    requests: Sequence[Request], indices: Sequence[int], size: int
) -> Iterator[list[int]]:
    """Batches of at least `size` requests that never part the requests of one image."""
    by_image: dict[str | None, list[int]] = {}
    for index in indices:
        by_image.setdefault(requests[index].image_key, []).append(index)
    batch: list[int] = []
    for same_image in by_image.values():
        batch += same_image
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
