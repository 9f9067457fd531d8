"""Questions in pairs, one answered Yes and one No, on the same fact: the subtasks of MME."""

from __future__ import annotations

import random
from collections.abc import Callable

from vlmamba.demo.questions.base import Pair, colored, countable, related_pair, sign_sum, sign_word
from vlmamba.demo.vocabulary import COLORS, GROUP_OF, NUMBERS, PLACES, WORDS, plural, with_article
from vlmamba.demo.world import Scene


def count_pair(scene: Scene, rng: random.Random) -> Pair | None:
    """MME count: "Are there two dogs in this image?" """
    name = countable(scene, rng)
    if name is None:
        return None
    right = scene.counts[name]
    likely = {1: 5, 2: 3, 3: 2, 4: 2}  # of a wrong number: about as often as it is right
    numbers = [n for n in likely if n != right]
    wrong = rng.choices(numbers, [likely[n] for n in numbers])[0]
    return Pair("count", _count_text(name, right), _count_text(name, wrong), (name,))


def _count_text(name: str, number: int) -> str:
    if number == 1:
        return f"Is there only one {with_article(name).split(' ', 1)[1]} in this image?"
    return f"Are there {NUMBERS[number]} {plural(name)} in this image?"


def position_pair(scene: Scene, rng: random.Random) -> Pair | None:
    """MME position: "Is the dog on the left side of the cat?" """
    found = related_pair(scene, rng)
    if found is None:
        return None
    first, side, second = found
    say = "on the {} side of".format
    words = {"left": say("left"), "right": say("right"), "above": "above", "below": "below"}
    other = {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
    return Pair(
        "position",
        f"Is the {first} {words[side]} the {second}?",
        f"Is the {first} {words[other]} the {second}?",
        (first, second),
    )


def color_pair(scene: Scene, rng: random.Random) -> Pair | None:
    """MME color: of the sign, or of the card behind a thing."""
    found = colored(scene, rng)
    if found is None:
        return None
    name, right = found
    wrong = rng.choice([color for color in COLORS if color != right])
    if name is None:
        say = "Is there {} sign in this image?".format
        return Pair("color", say(with_article(right)), say(with_article(wrong)))
    say = f"Is the card behind the {name} {{}}?".format
    return Pair("color", say(right), say(wrong), (name,))


def ocr_pair(scene: Scene, rng: random.Random) -> Pair | None:
    """MME OCR: 'Is the word in the sign "open"?'"""
    word = sign_word(scene)
    if word is None:
        return None
    wrong = rng.choice([other for other in WORDS if other != word])
    say = 'Is the word in the sign "{}"?'.format
    return Pair("OCR", say(word), say(wrong))


def scene_pair(scene: Scene, rng: random.Random) -> Pair:
    """MME scene: what the background shows."""
    wrong = rng.choice([place for place in PLACES if place != scene.place])
    say = "Does the background show {}?".format
    return Pair("scene", say(scene.place), say(wrong))


_GROUP_PHRASES = {"animal": "an animal", "vehicle": "a vehicle", "food": "something to eat"}
_DOUBTFUL = {  # classes that may pass for a member of the group
    "animal": {"teddy bear"},
    "vehicle": {"skateboard"},
    "food": {"bowl", "potted plant", "cup"},
}


def commonsense_pair(scene: Scene, rng: random.Random) -> Pair | None:
    """MME commonsense_reasoning: whether there is a thing of a kind."""
    there = {GROUP_OF.get(name) for name in scene.counts}
    right = [group for group in _GROUP_PHRASES if group in there]
    wrong = [
        group
        for group in _GROUP_PHRASES
        if group not in there and not _DOUBTFUL[group] & set(scene.counts)
    ]
    if not right or not wrong:
        return None
    yes, no = rng.choice(right), rng.choice(wrong)
    say = "Is there {} in this image?".format
    names = tuple(name for name in scene.counts if GROUP_OF.get(name) == yes)
    return Pair("commonsense_reasoning", say(_GROUP_PHRASES[yes]), say(_GROUP_PHRASES[no]), names)


def sum_pair(scene: Scene, rng: random.Random) -> Pair | None:
    """MME numerical_calculation: a sum on the sign."""
    right = sign_sum(scene)
    if right is None:
        return None
    wrong = rng.choice([n for n in range(max(2, right - 3), min(10, right + 3) + 1) if n != right])
    say = "Is the answer to the arithmetic question in the image {}?".format
    return Pair("numerical_calculation", say(right), say(wrong))


PAIRS: dict[str, Callable[[Scene, random.Random], Pair | None]] = {
    "count": count_pair,
    "position": position_pair,
    "color": color_pair,
    "OCR": ocr_pair,
    "scene": scene_pair,
    "commonsense_reasoning": commonsense_pair,
    "numerical_calculation": sum_pair,
}
