"""Rows of MMBench and ScienceQA: questions with lettered options."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from vlmamba.demo import questions as ask
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.conversations import HINTS
from vlmamba.demo.world import Scene

_LETTERS = "ABCD"
_MMBENCH = {  # kind -> (category, L2-category)
    "which object": ("object_localization", "finegrained_perception (instance-level)"),
    "what place": ("image_scene", "coarse_perception"),
    "what color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "where": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "how many": ("object_localization", "finegrained_perception (instance-level)"),
    "read": ("ocr", "finegrained_perception (instance-level)"),
}


def mmbench(source: Source) -> list[dict]:
    """Questions with two to four options, each in all rotations of its options (CircularEval).

    Copy k of question i has index i + 1,000,000 k; a missing option or hint is the text "nan", as
    in the published table.
    """
    rng = source.rng()
    rows = []
    for number, scene in enumerate(source.take(70, sign_chance=0.45)):
        question = _shortened(_choice(scene, rng, list(_MMBENCH)), rng)
        hint = rng.choice(HINTS) if rng.random() < 0.25 else "nan"
        for turn in range(len(question.options)):
            rows.append(_mmbench_row(number, turn, question, hint, scene))
    return rows


def _choice(scene: Scene, rng: random.Random, kinds: list[str]) -> ask.Question:
    """A question with options of a kind that the scene allows."""
    for kind in rng.sample(kinds, len(kinds)):
        question = ask.CHOICES[kind](scene, rng)
        if question:
            return question if kind != "which object" else replace(question, kind=kind)
    raise AssertionError("an object can always be asked for")


def _shortened(question: ask.Question, rng: random.Random) -> ask.Question:
    """Sometimes with one or two wrong options left out."""
    wrong = [option for option in question.options if option != question.answer]
    kept = {question.answer, *rng.sample(wrong, min(rng.choice((1, 2, 3, 3, 3, 3)), len(wrong)))}
    return replace(question, options=tuple(o for o in question.options if o in kept))


def _mmbench_row(number: int, turn: int, question: ask.Question, hint: str, scene: Scene) -> dict:
    options = [*question.options[turn:], *question.options[:turn]]
    category, level2 = _MMBENCH[question.kind]
    return {
        "index": number + 1_000_000 * turn,
        "question": question.text,
        "hint": hint,
        "answer": _LETTERS[options.index(question.answer)],
        **dict(itertools.zip_longest(_LETTERS, options, fillvalue="nan")),
        "category": category,
        "image": scene,
        "source": "demo",
        "L2-category": level2,
        "comment": "nan",
        "split": "dev",
    }


def scienceqa(source: Source) -> list[dict]:
    """The full table: questions with a picture (the image subset), and some without."""
    rng = source.rng()
    rows = []
    for scene in source.take(160, sign_chance=0.45):
        question = _shortened(_choice(scene, rng, list(ask.CHOICES)), rng)
        rows.append(
            _scienceqa_row(question, scene, rng.choice(HINTS) if rng.random() < 0.3 else "")
        )
    for _ in range(80):
        question = rng.choice(list(ask.TEXT_ONLY.values()))(rng)
        rows.append(_scienceqa_row(_shortened(question, rng), None, ""))
    rng.shuffle(rows)
    return rows


def _scienceqa_row(question: ask.Question, scene: Scene | None, hint: str) -> dict:
    return {
        "image": scene,
        "question": question.text,
        "choices": list(question.options),
        "answer": question.options.index(question.answer),
        "hint": hint,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "demo world",
        "category": question.kind,
        "skill": question.kind,
        "lecture": "",
        "solution": f"The answer is {question.answer}.",
    }
