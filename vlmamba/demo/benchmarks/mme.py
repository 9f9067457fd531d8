"""Rows of the demo world's MME: two questions a picture, one answered Yes and one No."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vlmamba.demo import questions as ask
from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.vocabulary import with_article
from vlmamba.demo.world import Scene

# All fourteen subtasks of MME; the demo fills those that its world can express.
MME_SUBTASKS = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR", "commonsense_reasoning", "numerical_calculation", "text_translation"),
    "code_reasoning",
)
MME_IMAGES = {  # subtask -> pictures, two questions each
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "scene": 30,
    "OCR": 20,
    "commonsense_reasoning": 30,
    "numerical_calculation": 20,
}
_MME_NEEDS: dict[str, dict[str, Any]] = {  # subtask -> options of its scenes
    "count": {"classes": (1, 1, 2, 2, 3), "repeat_chance": 0.85, "sign_chance": 0.1},
    "color": {"card_chance": 0.5, "sign_chance": 0.5},
    "OCR": {"sign_chance": 1.0, "sum_chance": 0.0},
    "numerical_calculation": {"sign_chance": 1.0, "sum_chance": 1.0},
}


def mme(source: Source) -> list[dict]:
    """Two questions a picture, one answered Yes and one No, for each subtask at hand."""
    rng = source.rng()
    return [
        row
        for subtask, images in MME_IMAGES.items()
        for row in _mme_subtask(source, subtask, images, rng)
    ]


def _mme_subtask(source: Source, subtask: str, images: int, rng: random.Random) -> Iterator[dict]:
    balance = ask.Existence()
    asked = ask.PAIRS.get(subtask) or (lambda scene, rng: _existence_pair(scene, rng, balance))
    scenes = replace(source, task=f"mme/{subtask}").scenes(**_MME_NEEDS.get(subtask, {}))
    number = 0
    while number < images:
        scene = next(scenes)
        pair = asked(scene, rng)
        if pair is None:
            continue
        number += 1
        questions = [(pair.yes, "Yes"), (pair.no, "No")]
        rng.shuffle(questions)
        for text, answer in questions:
            yield {
                "question_id": f"{subtask}/{number:04d}.png",
                "image": scene,
                "question": f"{text} Please answer yes or no.",
                "answer": answer,
                "category": subtask,
            }


def _existence_pair(scene: Scene, rng: random.Random, balance: ask.Existence) -> ask.Pair:
    yes, no = balance.pick_present(list(scene.counts)), balance.pick_absent(scene, rng, set())
    balance.surplus[yes] += 1
    balance.surplus[no] -= 1
    say = "Is there {} in this image?".format
    return ask.Pair("existence", say(with_article(yes)), say(with_article(no)), (yes,))
