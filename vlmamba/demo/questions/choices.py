"""Questions with options, with a picture and without: those of ScienceQA and MMBench."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from vlmamba.demo.questions.base import Question, close_absent
from vlmamba.demo.questions.short import how_many, read_sign, what_color, what_place, where
from vlmamba.demo.vocabulary import CLASSES, COLORS, GROUP_OF, GROUPS, PLACES, WORDS
from vlmamba.demo.world import Scene

CORNERS = ("top left", "top right", "bottom left", "bottom right")


def which_object(scene: Scene, rng: random.Random) -> Question:
    """The one of the options that is there."""
    right = rng.choice(list(scene.counts))
    options = _options(rng, right, close_absent(scene, rng))
    return Question("which object", "Which object is in the image?", right, options, (right,))


def _options(rng: random.Random, right: str, wrong: Iterable[str], number: int = 4):
    others = [name for name in wrong if name != right]
    options = [right, *rng.sample(others, min(number - 1, len(others)))]
    rng.shuffle(options)
    return tuple(options)


def _with_options(
    asker: Callable[[Scene, random.Random], Question | None], wrong: Iterable[str]
) -> Callable[[Scene, random.Random], Question | None]:
    """The open question with options drawn from `wrong`."""

    def ask(scene: Scene, rng: random.Random) -> Question | None:
        question = asker(scene, rng)
        if question is None:
            return None
        options = _options(rng, question.answer, wrong)
        return Question(question.kind, question.text, question.answer, options, question.names)

    return ask


CHOICES: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "which object": which_object,
    "what place": _with_options(what_place, PLACES),
    "what color": _with_options(what_color, COLORS),
    "where": _with_options(where, CORNERS),
    "how many": _with_options(how_many, "012345"),
    "read": _with_options(read_sign, WORDS),
}


def which_kind(rng: random.Random) -> Question:
    """Without a picture: "Which of these is an animal?" """
    phrases = {
        "animal": "an animal",
        "vehicle": "a vehicle",
        "food": "food",
        "furniture": "a piece of furniture",
        "tool": "a tool",
    }
    group = rng.choice(list(phrases))
    right = rng.choice(GROUPS[group])
    wrong = [name for name in CLASSES if name in GROUP_OF and GROUP_OF[name] != group]
    return Question(
        "which kind", f"Which of these is {phrases[group]}?", right, _options(rng, right, wrong)
    )


def text_sum(rng: random.Random) -> Question:
    """Without a picture: "What is 2 plus 3?" """
    a, b = rng.randint(1, 5), rng.randint(1, 5)
    options = _options(rng, str(a + b), [str(n) for n in range(2, 11)])
    return Question("text sum", f"What is {a} plus {b}?", str(a + b), options)


TEXT_ONLY: dict[str, Callable[[random.Random], Question]] = {
    "which kind": which_kind,
    "text sum": text_sum,
}
