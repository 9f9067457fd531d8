"""Rows of `retrieval`: the sign below one of k things, near its picture and far from it.

Each scene is asked four questions (a word, a color, a thing that is there, one that is not), and
each question five times: right behind the picture, behind 64 or 256 words of other text, and
behind 2 or 4 further pictures.  So what a distance costs is seen on the same questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from vlmamba.demo.benchmarks.source import Source
from vlmamba.demo.labeled import further_scenes, labeled_scene
from vlmamba.demo.questions.base import Question
from vlmamba.demo.questions.labeled import Presence, is_there, sign_color_of, sign_word_of
from vlmamba.demo.text import filler
from vlmamba.demo.vocabulary import COLORS, WORDS
from vlmamba.demo.world import Scene

THINGS = (1, 2, 4, 8, 16)
SCENES = 40  # of each number of things
FILLERS = {"near": 0, "text64": 64, "text256": 256}  # distance -> words before the question
PICTURES = {"pictures2": 2, "pictures4": 4}  # distance -> further pictures


@dataclass(frozen=True)
class _Shown:
    """What stands before a question: one picture or more, the one that is asked about first."""

    distance: str
    scenes: tuple[Scene, ...]
    context: str = ""


def retrieval(source: Source) -> list[dict]:
    """4,000 questions: 40 scenes x 5 numbers of things x 5 distances x 4 questions.

    The first half of the rows is a benchmark of half the scenes, balanced as the whole is.
    """
    rows: list[dict] = []
    presence = Presence()
    for index in range(SCENES):
        for number in THINGS:
            seed = f"{source.split}/{source.task}/{source.seed}/{number}/{index}"
            scene = labeled_scene(seed, number, source.styles)
            rows += _rows(scene, f"{number:02d}-{index:03d}", source, presence)
    return [row | {"question_id": place} for place, row in enumerate(rows)]


def _rows(scene: Scene, name: str, source: Source, presence: Presence) -> Iterator[dict]:
    """All questions on one scene at every distance."""
    rng = random.Random(f"{scene.seed}/rows")
    further = further_scenes(f"{scene.seed}/further", scene, max(PICTURES.values()), source.styles)
    yes, no = presence.pair([scene, *further], rng)
    word, color = (rng.randrange(len(scene.things)) for _ in "wc")
    shown = [_Shown(distance, (scene,), filler(rng, n)) for distance, n in FILLERS.items()]
    shown += [_Shown(d, (scene, *further[:n])) for d, n in PICTURES.items()]
    for one in shown:
        asked = [sign_word_of(scene, word), sign_color_of(scene, color)]
        asked += [is_there(n, n == yes, len(one.scenes)) for n in (yes, no)]
        for question in asked:
            yield {
                "image_source": name,
                "image": list(one.scenes),
                "context": one.context,
                "question": question.text,
                "answer": question.answer.lower(),
                "kind": question.kind,
                "k": len(scene.things),
                "distance": one.distance,
                **_chance(question, one.scenes),
            }


def _chance(question: Question, scenes: tuple[Scene, ...]) -> dict[str, float]:
    """How often a guess is right: of any sign that is in view, and of any answer there may be."""
    if question.kind == "existence":
        return {"chance_in_view": 1 / 2, "chance_blind": 1 / 2}
    labels = [label for scene in scenes for label in scene.labels]
    said = [label.text if question.kind == "word" else label.color for label in labels]
    answers = WORDS if question.kind == "word" else COLORS
    share = said.count(question.answer) / len(said)
    return {"chance_in_view": share, "chance_blind": 1 / len(answers)}
