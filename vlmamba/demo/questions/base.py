"""What a question is, and what all kinds of questions read off a scene."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from vlmamba.demo.vocabulary import CLASSES, THEMES, with_article
from vlmamba.demo.world import SIDE, Scene, Thing

SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA-1.5's instruction
APART = 36  # pixels between two centers that count as beside or above each other


@dataclass(frozen=True)
class Question:
    """`answer` is a word, or one of `options`; `names`: classes that text or answer give away."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two yes/no questions on one fact, as in MME: the first is answered Yes, the second No."""

    kind: str
    yes: str
    no: str
    names: tuple[str, ...] = ()

    def one(self, rng: random.Random) -> Question:
        """Either question, by a fair coin."""
        yes = rng.random() < 0.5
        return Question(self.kind, self.yes if yes else self.no, yes_no(yes), names=self.names)


def yes_no(value: bool) -> str:
    return "Yes" if value else "No"


def absent(scene: Scene) -> list[str]:
    """Classes that may be denied: neither present nor partly shown."""
    return [name for name in CLASSES if name not in scene.counts and name not in scene.hidden]


def close_absent(scene: Scene, rng: random.Random) -> list[str]:
    """Absent classes: half of the time the theme's own."""
    everything = absent(scene)
    related = [name for name in THEMES[scene.theme] if name in everything]
    return related if related and rng.random() < 0.5 else everything


def countable(scene: Scene, rng: random.Random) -> str | None:
    """A class to count: one that is there several times, seldom a single one."""
    several = [name for name, number in scene.counts.items() if number > 1]
    if several and rng.random() < 0.85:
        return rng.choice(several)
    return rng.choice(list(scene.counts)) if rng.random() < 0.4 else None


def related_pair(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    """(class, "left" | "right" | "above" | "below", class) of two single things, clearly so."""
    single = [thing for thing in scene.things if scene.only(thing.name)]
    found = [
        (a.name, side, b.name)
        for a in single
        for b in single
        for side in ("left", "right", "above", "below")
        if a is not b and is_beside(a, side, b)
    ]
    return rng.choice(found) if found else None


def is_beside(a: Thing, side: str, b: Thing) -> bool:
    return {
        "left": b.x - a.x,
        "right": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }[side] > APART


def half(position: int, first: str, second: str) -> str:
    """The half of the picture that a coordinate lies in."""
    return first if position < SIDE // 2 else second


def corner_of(thing: Thing) -> str | None:
    if abs(thing.x - SIDE // 2) < 28 or abs(thing.y - SIDE // 2) < 28:
        return None
    return f"{half(thing.y, 'top', 'bottom')} {half(thing.x, 'left', 'right')}"


def colored(scene: Scene, rng: random.Random) -> tuple[str | None, str] | None:
    """(class of a single thing on a card, or None for the sign; the color)."""
    cards = [(t.name, t.card) for t in scene.things if t.card and scene.only(t.name)]
    if scene.sign and (not cards or rng.random() < 0.5):
        return None, scene.sign.color
    return rng.choice(cards) if cards else None


def sign_word(scene: Scene) -> str | None:
    """The sign's word; None without a sign, and for a sum."""
    return scene.sign.text if scene.sign and "+" not in scene.sign.text else None


def sign_sum(scene: Scene) -> int | None:
    if scene.sign is None or "+" not in scene.sign.text:
        return None
    return sum(map(int, scene.sign.text.split("+")))


class Existence:
    """Asks whether a class is there, and remembers how often each was asked with yes and no."""

    def __init__(self) -> None:
        self.surplus: Counter[str] = Counter()  # class -> yes minus no so far

    def ask(self, scene: Scene, rng: random.Random, avoid: Iterable[str] = ()) -> Question | None:
        """One question on a class not in `avoid`; None when no present class is left to ask.

        (Then a "no" is not asked either, or the earlier turns would tell the answer.)
        """
        avoid = set(avoid)
        present = [name for name in scene.counts if name not in avoid]
        if not present:
            return None
        yes = rng.random() < 0.5
        name = self.pick_present(present) if yes else self.pick_absent(scene, rng, avoid)
        self.surplus[name] += 1 if yes else -1
        where = "the" if rng.random() < 0.7 else "this"
        text = f"Is there {with_article(name)} in {where} image?"
        return Question("existence", text, yes_no(yes), names=(name,))

    def checklist(self, scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
        """Every class that is there ("yes") and as many that are not ("no"), mixed."""
        denied: list[str] = []
        for _ in scene.counts:
            denied.append(self.pick_absent(scene, rng, set(denied)))
            self.surplus[denied[-1]] -= 1
        self.surplus.update(list(scene.counts))
        names = [*((name, "yes") for name in scene.counts), *((name, "no") for name in denied)]
        rng.shuffle(names)
        return names

    def pick_present(self, names: list[str]) -> str:
        """The class asked with yes least."""
        return min(names, key=lambda name: self.surplus[name])

    def pick_absent(self, scene: Scene, rng: random.Random, avoid: set[str]) -> str:
        """A random, a popular or a related class: the one most in need of a "no" of a few."""
        allowed = [name for name in absent(scene) if name not in avoid]
        related = [name for name in THEMES[scene.theme] if name in allowed]
        pool = related if related and rng.random() < 0.6 else allowed
        return max(rng.choices(pool, k=8), key=lambda name: self.surplus[name])
