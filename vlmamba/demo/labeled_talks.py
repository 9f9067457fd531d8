"""Conversations about things with signs, for training on what the benchmark `retrieval` asks.

    talk = labeled_talk("train/0/labeled/7", presence, styles)
    talk.scenes, talk.questions    # one picture or more; up to five questions, or all signs

Numbers of things, lengths of the text before the first question and numbers of further pictures
cover the benchmark's range and what lies between.  Half of the questions on several pictures are
about a later one, so that the first is not all that counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmamba.demo.labeled import MOST, further_scenes, labeled_scene, words_of
from vlmamba.demo.questions.base import SHORT_ANSWER, Question
from vlmamba.demo.questions.labeled import (
    Presence,
    is_there,
    sign_color_of,
    sign_word_of,
    signs_of,
)
from vlmamba.demo.text import filler
from vlmamba.demo.vocabulary import TRAINING_STYLES, with_article
from vlmamba.demo.world import Scene
from vlmamba_core.tokens import UNIT

THINGS = (1, 2, 3, 4, 6, 8, 12, 16)
KINDS = ("word", "word", "color", "color", "existence")
TEXT_CHANCE, PICTURES_CHANCE = 0.2, 0.2  # of a distance; else questions stand right behind
LISTS = 0.4  # of the talks: the signs of all things in one answer, each behind its thing's name
LONGEST_TEXT, MOST_PICTURES = 256, 4


@dataclass(frozen=True)
class Talk:
    """Scenes in the order in which they are shown, and the questions on them with a context."""

    scenes: tuple[Scene, ...]
    context: str
    questions: tuple[Question, ...]


def labeled_talk(
    seed: str, presence: Presence, styles: Sequence[str] = TRAINING_STYLES, variants: bool = False
) -> Talk:
    """The talk of this seed: up to five different questions."""
    rng = random.Random(f"{seed}/talk")
    scene = labeled_scene(seed, rng.choice(THINGS), styles, variants=variants)
    scenes, context, chance = [scene], "", rng.random()
    if chance < TEXT_CHANCE:
        context = filler(rng, rng.randint(8, LONGEST_TEXT))
    elif chance < TEXT_CHANCE + PICTURES_CHANCE:
        number = rng.randint(1, MOST_PICTURES)
        scenes += further_scenes(f"{seed}/further", scene, number, styles, variants=variants)
    if random.Random(f"{seed}/list").random() < LISTS:
        return Talk(tuple(scenes), context, (signs_of(scenes),))
    asked = (_question(kind, scenes, presence, rng) for kind in rng.sample(KINDS, len(KINDS)))
    distinct = {question.text: question for question in asked}
    return Talk(tuple(scenes), context, tuple(distinct.values()))


def _question(
    kind: str, scenes: Sequence[Scene], presence: Presence, rng: random.Random
) -> Question:
    if kind == "existence":
        yes, no = presence.pair(scenes, rng)
        there = rng.random() < 0.5
        return is_there(yes if there else no, there, len(scenes))
    scene = scenes[0] if rng.random() < 0.5 else rng.choice(scenes)
    ask = sign_word_of if kind == "word" else sign_color_of
    return ask(scene, rng.randrange(len(scene.things)))


# What is said before a sign's color or word, or "yes", from the bare name to the benchmark's
# question: the answer stands further and further behind the name (results/LOG.md)
RECALL_FORMS = (
    ("{name}", "{name}?"),
    ("{name} {kind}", "a {name}?"),
    ("the {name}'s {kind}:", "is there {a_name}?"),
    ("{kind} below the {name}:", "Is there {a_name}?"),
    ("{question}",) * 2,
    (f"{{question}} {SHORT_ANSWER}",) * 2,
    (f"USER: {{question}} {SHORT_ANSWER} ASSISTANT:",) * 2,
)
SAID = 16  # answers of a line at most


@dataclass(frozen=True)
class Level:
    """A part of what is recalled: how many forms, how many things, and how often all is told.

    early, few: exponents that make early forms, and scenes of few things, more frequent (1: not).
    empty: the chance that empty cells are told too, as patches of a picture will be.
    """

    forms: int
    things: int
    early: float
    few: float
    empty: float


LEVELS = (  # the first, a copy from one of few things, is what a language model finds at all
    Level(1, 4, 1, 1, 0),
    Level(4, 8, 1, 1.5, 0),
    Level(len(RECALL_FORMS), MOST, 0.7, 2, 0.3),
)


def recall_lines(seed: str, number: int, level: Level) -> Iterator[str]:
    """Lines of a scene told in words and what is on its signs and whether things are there, in one
    of RECALL_FORMS; only the answers are to be learned (`vlmamba.data.text`)."""
    presence = Presence()
    for index in range(number):
        rng = random.Random(f"{seed}/{index}/recall")
        things = 1 + int(level.things * rng.random() ** level.few)
        scene = labeled_scene(f"{seed}/{index}", things, TRAINING_STYLES)
        form = RECALL_FORMS[int(level.forms * rng.random() ** level.early)]
        asks = (sign_word_of, sign_color_of)
        questions = [ask(scene, place) for place in range(things) for ask in asks]
        for _ in range(rng.randint(0, 2) if level.forms > 1 else 0):
            yes, no = presence.pair([scene], rng)
            questions += [is_there(yes, True), is_there(no, False)]
        said = list(dict.fromkeys(recalled(form, scene, question) for question in questions))
        some = rng.sample(said, min(len(said), SAID))
        asked = ",".join(f" {text}{UNIT} {answer}{UNIT}" for text, answer in some)
        yield f"{words_of(scene, empty=rng.random() < level.empty)}:{asked}"


def recalled(form: tuple[str, str], scene: Scene, question: Question) -> tuple[str, str]:
    """A question in one of RECALL_FORMS, and its answer; the first form's is color and word."""
    of_sign, there = form
    [name] = question.names
    said = {"name": name, "a_name": with_article(name), "kind": question.kind}
    if question.kind == "existence":
        text = there.format(**said, question=question.text)
        return text, question.answer if "Is " in text else question.answer.lower()
    place = [thing.name for thing in scene.things].index(name)
    both = f"{scene.labels[place].color} {scene.labels[place].text}"
    answer = both if form == RECALL_FORMS[0] else question.answer
    return of_sign.format(**said, question=question.text), answer


def labeled_lines(seed: str, number: int) -> Iterator[str]:
    """Lines of one scene told in words and its questions, each with its answer right behind."""
    presence = Presence()
    for index in range(number):
        talk = labeled_talk(f"{seed}/{index}", presence)
        told = " ".join(map(words_of, talk.scenes))
        asked = " ".join(f"{one.text} {one.answer}." for one in talk.questions)
        yield f"{told}: {asked}"
