"""What the harness asks of a model: a name, what its answers depend on, and answers.

    class Constant(EvalModel):
        name = "constant"

        def provenance(self):
            return {"answer": "yes"}

        def answer(self, requests, limits, batch_size, on_done):
            for index, _ in enumerate(requests):
                on_done(index, "yes")

`harness.models.resumable` adds everything that does not depend on the model.
"""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image

from vlmamba_core.folder import digest


class OnDone(Protocol):
    """Takes the answers as they come."""

    def __call__(self, index: int, text: str | None, reason: str = "") -> None:
        """text: the answer to request `index`; None: it has none, for the reason given."""


@dataclass(eq=False)
class Picture:
    """One image of a request: equal keys mean equal content.

    read: gives the decoded image; raises harness.data.images.UnreadableImage where it is broken.
    """

    key: str
    read: Callable[[], Image.Image] = field(repr=False)
    _image: Image.Image | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image:
        """The picture, decoded at first use and kept until `release`."""
        image = self._image  # once: another thread may release it
        if image is None:
            image = self._image = self.read()
        return image

    def share(self, other: Picture) -> None:
        """Show the decoded picture of `other`, which has the same content: it is decoded once.

        Raises harness.data.images.UnreadableImage where it is broken.
        """
        self._image = other.image

    def release(self) -> None:
        """Forget the decoded picture."""
        self._image = None


SAMPLING, TURNS, LOGLIKELIHOOD = "sampling or beams", "earlier turns", "log-likelihoods"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen where it is not the likeliest each time; names as in generate().

    None: the model's own setting.  seed: of the draws, together with all that a request asks.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What generate() is given; nothing that beams or greedy decoding have no use for."""
        if not self.do_sample:
            return {"do_sample": False, "num_beams": self.num_beams}
        found = {name: value for name, value in asdict(self).items() if value is not None}
        del found["seed"]
        return found


@dataclass(frozen=True)
class Limits:
    """How an answer is made: at most max_new_tokens, cut before the first of the stop strings.

    until: an empty one ends nothing, and is left out.  sampling: None for greedy answers.  unset:
    the task says nothing of the length, and max_new_tokens is what most of lmms-eval's models take.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: Sampling | None = None
    unset: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", tuple(stop for stop in self.until if stop))


@dataclass(frozen=True)
class Turn:
    """What was said before a question: "system", "user" or "assistant", and its pictures."""

    role: str
    text: str
    pictures: int = 0


@dataclass(frozen=True)
class Request:
    """One question: the text of the user's turn without image tags, and its pictures.

    task and row say where it came from (row counts from 0); a record names them.  vote: which of
    several sampled answers to the same question this one is to be, from 0.
    before: the turns before this one; their pictures are the first ones of `pictures`.
    continuation: not an answer is wanted, but how likely the model thinks this one; the "text" of
    it is what `likelihood_text` writes.
    """

    task: str
    row: int
    prompt: str
    pictures: tuple[Picture, ...]
    limits: Limits
    vote: int = 0
    before: tuple[Turn, ...] = ()
    continuation: str | None = None

    @property
    def image_key(self) -> str | None:
        """One key for all pictures; None without any."""
        return "+".join(picture.key for picture in self.pictures) or None

    @property
    def needs(self) -> frozenset[str]:
        """What a model must offer to answer it, besides greedy answers to one turn."""
        told = {
            SAMPLING: self.limits.sampling is not None,
            TURNS: bool(self.before),
            LOGLIKELIHOOD: self.continuation is not None,
        }
        return frozenset(name for name, needed in told.items() if needed)

    def seed(self, seed: int) -> int:
        """Of what is drawn for it in a run of that seed: an answer depends on no neighbor."""
        asked = [seed, self.task, self.row, self.prompt, self.image_key, self.vote]
        return int(digest(asked)[:15], 16)

    @property
    def extras(self) -> list[Any]:
        """What the answer depends on besides prompt, pictures, limits and vote; mostly empty."""
        if not self.needs:
            return []
        turns = [[turn.role, turn.text, turn.pictures] for turn in self.before]
        sampling = self.limits.sampling and asdict(self.limits.sampling)
        return [turns, sampling, self.continuation]


def likelihood_text(log_probability: float, tokens: int, is_greedy: bool) -> str:
    """The answer to a request with a continuation, as a journal keeps it.

    The sum of its tokens' log-probabilities, their number, and whether each was the likeliest.
    """
    return json.dumps([log_probability, tokens, is_greedy])


def likelihood(text: str) -> tuple[float, int, bool]:
    """What `likelihood_text` wrote."""
    log_probability, tokens, is_greedy = json.loads(text)
    return float(log_probability), int(tokens), bool(is_greedy)


@dataclass
class Agreement:
    """Requests of a run that were also answered alone, and how many of these had another answer."""

    asked: int = 0
    different: int = 0


class EvalModel(ABC):
    """A model that can be evaluated. Its answers must not depend on their neighbors."""

    name: str
    batch_size: int = 1
    parameters: int | None = None
    offers: frozenset[str] = frozenset()  # of SAMPLING, TURNS, LOGLIKELIHOOD; others are not asked
    notes: tuple[str, ...] = ()  # what a record and its reader must know of how answers are made
    device: Any = None  # torch's, where the model runs in this process
    seconds: Mapping[str, float] = MappingProxyType({})  # so far, by part of answering; if known
    depends_on_batch: bool = True  # whether an answer's last bits may, so a rerun asks again
    also_alone: int = 0  # the first requests of a run, which `answer_alone` is asked too

    @functools.cached_property
    def agreement(self) -> Agreement:
        """What came of the requests that were asked both ways."""
        return Agreement()

    @property
    def prefetches(self) -> bool:
        """Whether a thread decodes and prepares the next pictures while it computes.

        A model on a CPU has all cores itself; one of another process has threads of its own.
        """
        return getattr(self.device, "type", "cpu") != "cpu"

    def prepare(self, requests: Sequence[Request]) -> None:  # noqa: B027  # none is needed
        """Do ahead what can be done of requests with decoded pictures, soon to be answered.

        Where it `prefetches`: called in another thread, while it answers other requests.
        """

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """All that an answer depends on besides the request, JSON-serializable.

        A journal's answers are found again only under equal provenance.
        """

    @abstractmethod
    def answer(
        self, requests: Sequence[Request], limits: Limits, batch_size: int, on_done: OnDone
    ) -> None:
        """Call on_done(index, text) once for each request, in any order, as each one ends.

        A request that this model cannot answer is on_done(index, None, reason): it is counted.
        Raises torch.OutOfMemoryError or MemoryError where `batch_size` is too much: the rest is
        asked again with half of it.
        """

    def answer_alone(self, request: Request) -> str:
        """The answer by the plainest way there is: what `answer` must give too."""
        raise NotImplementedError("it has no answer_alone")

    def begin_task(self, task: str, pictures: Sequence[Picture], batch_size: int) -> Any:
        """Called before a task's first answer with its distinct readable pictures.

        What it returns is part of the key of this task's answers (a blind run's images).
        """
        return None

    def describe(self) -> dict[str, Any]:
        """What a record says of the model besides its name."""
        return {}

    def generate_tokens(self, request: Request, new_tokens: int) -> int | None:
        """Decode `new_tokens` for one request, past any end token where the model can do that.

        Returns how many came; None where nobody can say.  For `harness.models.cost`: greedy, the
        request alone, nothing kept from an earlier call.
        """
        raise NotImplementedError("it has no generate_tokens")
