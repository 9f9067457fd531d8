"""Questions answered by a word or a number: those of VQAv2, GQA and TextVQA."""

from __future__ import annotations

import random
from collections.abc import Callable

from vlmamba.demo.questions.base import (
    Question,
    absent,
    close_absent,
    colored,
    corner_of,
    countable,
    is_beside,
    related_pair,
    sign_sum,
    sign_word,
)
from vlmamba.demo.vocabulary import GROUPS, plural, with_article
from vlmamba.demo.world import Scene

READ_TEXTS = (
    "What does the sign say?",
    "What word is on the sign?",
    "What is written on the sign?",
)


def how_many(scene: Scene, rng: random.Random) -> Question | None:
    """ "How many dogs are there?"; sometimes there are 0."""
    name = rng.choice(absent(scene)) if rng.random() < 0.08 else countable(scene, rng)
    if name is None:
        return None
    text = f"How many {plural(name)} are there?"
    return Question("how many", text, str(scene.counts[name]), names=(name,))


def what_color(scene: Scene, rng: random.Random) -> Question | None:
    """The color of the sign, or of the card behind a thing."""
    found = colored(scene, rng)
    if found is None:
        return None
    name, color = found
    if name is None:
        return Question("what color", "What color is the sign?", color)
    return Question("what color", f"What color is the card behind the {name}?", color, (), (name,))


def where(scene: Scene, rng: random.Random) -> Question | None:
    """ "Where is the dog?": the corner of the picture."""
    corners = [(t.name, corner_of(t)) for t in scene.things if scene.only(t.name)]
    found = [(name, corner) for name, corner in corners if corner]
    if not found:
        return None
    name, corner = rng.choice(found)
    return Question("where", f"Where is the {name}?", corner, names=(name,))


def which_side(scene: Scene, rng: random.Random) -> Question | None:
    """GQA's choice of a relation: "Is the dog to the left or to the right of the cat?" """
    found = related_pair(scene, rng)
    if found is None:
        return None
    first, side, second = found
    pair = "to the left or to the right of" if side in ("left", "right") else "above or below"
    return Question(
        "which side", f"Is the {first} {pair} the {second}?", side, names=(first, second)
    )


def what_beside(scene: Scene, rng: random.Random) -> Question | None:
    """GQA's relation: "What is to the left of the cat?", where one class alone is."""
    phrases = {"left": "to the left of", "right": "to the right of"}
    found = []
    for thing in scene.things:
        for side in ("left", "right", "above", "below"):
            names = {o.name for o in scene.things if o is not thing and is_beside(o, side, thing)}
            if scene.only(thing.name) and len(names) == 1:
                found.append((thing.name, phrases.get(side, side), *names))
    if not found:
        return None
    anchor, phrase, answer = rng.choice(found)
    return Question(
        "what beside", f"What is {phrase} the {anchor}?", answer, names=(anchor, answer)
    )


def what_kind(scene: Scene, rng: random.Random) -> Question | None:
    """ "What animal is in the image?", where one class alone of the group is."""
    found = []
    for group in ("animal", "vehicle", "food", "furniture", "toy", "tool", "device"):
        names = [name for name in scene.counts if name in GROUPS[group]]
        if len(names) == 1:
            found.append((group, names[0]))
    if not found:
        return None
    group, name = rng.choice(found)
    return Question("what kind", f"What {group} is in the image?", name, names=(name,))


def which_one(scene: Scene, rng: random.Random) -> Question:
    """GQA's choice of an object: "Which is in the image, a dog or a cat?" """
    right, wrong = rng.choice(list(scene.counts)), rng.choice(close_absent(scene, rng))
    first, second = rng.sample((right, wrong), 2)
    text = f"Which is in the image, {with_article(first)} or {with_article(second)}?"
    return Question("which one", text, right, names=(right,))


def what_place(scene: Scene, rng: random.Random) -> Question:
    """What the background shows."""
    return Question("what place", "What is in the background?", scene.place)


def read_sign(scene: Scene, rng: random.Random) -> Question | None:
    """TextVQA: "What does the sign say?" """
    word = sign_word(scene)
    if word is None:
        return None
    return Question("read", rng.choice(READ_TEXTS), word)


def what_sum(scene: Scene, rng: random.Random) -> Question | None:
    """The sum on the sign."""
    total = sign_sum(scene)
    if total is None:
        return None
    return Question("what sum", "What is the answer to the sum?", str(total))


OPEN: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "how many": how_many,
    "what color": what_color,
    "where": where,
    "which side": which_side,
    "what beside": what_beside,
    "what kind": what_kind,
    "which one": which_one,
    "what place": what_place,
    "read": read_sign,
    "what sum": what_sum,
}
