"""Questions about things with signs of their own (`demo.labeled`), and what is there at all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from vlmamba.demo.questions.base import Question
from vlmamba.demo.vocabulary import CLASSES, SHOWN_WITH, with_article
from vlmamba.demo.world import Scene


def sign_word_of(scene: Scene, place: int) -> Question:
    """The word on the sign of the thing at `place` in the scene's order."""
    name = scene.things[place].name
    text = f"Which word is on the sign below the {name}?"
    return Question("word", text, scene.labels[place].text, names=(name,))


def sign_color_of(scene: Scene, place: int) -> Question:
    """The color of the sign of the thing at `place` in the scene's order."""
    name = scene.things[place].name
    text = f"What color is the sign below the {name}?"
    return Question("color", text, scene.labels[place].color, names=(name,))


def signs_of(scenes: Sequence[Scene]) -> Question:
    """What is on the sign of each thing, in the scenes' order of things, which is no reading order:
    as many lookups as things, each right behind the name that it is about."""
    shown = [pair for scene in scenes for pair in zip(scene.things, scene.labels, strict=True)]
    told = ", ".join(f"{thing.name} {sign.color} {sign.text}" for thing, sign in shown)
    names = tuple(thing.name for thing, _ in shown)
    return Question("signs", "What is on each sign?", told, names=names)


class Presence:
    """Asks whether a thing is in any of some scenes: a class about as often with yes as with no."""

    def __init__(self) -> None:
        self.surplus: Counter[str] = Counter()  # class -> yes minus no so far

    def pair(self, scenes: Sequence[Scene], rng: random.Random) -> tuple[str, str]:
        """(a class that the first scene shows, one that none of the scenes shows a bit of)."""
        shown = [thing.name for scene in scenes for thing in scene.things]
        partly = {other for name in shown for other in SHOWN_WITH.get(name, ())}
        first = [thing.name for thing in scenes[0].things]
        yes = min(rng.sample(first, len(first)), key=lambda name: self.surplus[name])
        self.surplus[yes] += 1
        colors = {sign.color for scene in scenes for sign in scene.labels}  # "orange" is one, too
        allowed = [name for name in CLASSES if name not in {*shown, *partly, *colors}]
        no = max(rng.sample(allowed, len(allowed)), key=lambda name: self.surplus[name])
        self.surplus[no] -= 1
        return yes, no


def is_there(name: str, answer: bool, pictures: int = 1) -> Question:
    """Whether a thing of this class is in the image, or in any of several."""
    where = "image" if pictures == 1 else "images"
    text = f"Is there {with_article(name)} in the {where}?"
    return Question("existence", text, "Yes" if answer else "No", names=(name,))
