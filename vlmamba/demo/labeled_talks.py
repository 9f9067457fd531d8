"""Conversations about things with signs, for training on what the benchmark `retrieval` asks.

    talk = labeled_talk("train/0/labeled/7", presence, styles)
    talk.scenes, talk.questions    # one picture or more; up to five questions

Numbers of things, lengths of the text before the first question and numbers of further pictures
cover the benchmark's range and what lies between.  Half of the questions on several pictures are
about a later one, so that the first is not all that counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlmamba.demo.labeled import further_scenes, labeled_scene, words_of
from vlmamba.demo.questions.base import Question
from vlmamba.demo.questions.labeled import Presence, is_there, sign_color_of, sign_word_of
from vlmamba.demo.text import filler
from vlmamba.demo.vocabulary import TRAINING_STYLES
from vlmamba.demo.world import Scene

THINGS = (1, 2, 3, 4, 6, 8, 12, 16)
KINDS = ("word", "word", "color", "color", "existence")
TEXT_CHANCE, PICTURES_CHANCE = 0.2, 0.2  # of a distance; else questions stand right behind
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


def labeled_lines(seed: str, number: int) -> Iterator[str]:
    """Lines of one scene told in words and its questions, each with its answer right behind."""
    presence = Presence()
    for index in range(number):
        talk = labeled_talk(f"{seed}/{index}", presence)
        told = " ".join(map(words_of, talk.scenes))
        asked = " ".join(f"{one.text} {one.answer}." for one in talk.questions)
        yield f"{told}: {asked}"
