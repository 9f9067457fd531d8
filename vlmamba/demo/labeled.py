"""Scenes of 1 to 16 things, each above a sign of its own: what in-context retrieval is asked about.

    labeled_scene(seed, 8, styles)              # eight things, eight different words
    further_scenes(seed, scene, 3, styles)       # more pictures, nothing in them twice

The picture is a grid of 4 x 4 cells.  A thing and its sign fill a cell whatever their number, so
that a scene of sixteen is not harder to see than a scene of one: only more is to be kept in mind.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from vlmamba.demo.vocabulary import CLASSES, COLORS, PLACES, SHOWN_WITH, WORDS
from vlmamba.demo.world import SIDE, Scene, Sign, Thing

ACROSS = 4  # cells on a side
MOST = ACROSS * ACROSS
CELL = SIDE // ACROSS  # pixels
THING = 36  # longer side, pixels
SIGN = (54, 18)  # pixels; a five-letter word then has capitals of 9 pixels, a shorter one of 12
FURTHER = 3  # things in each further picture, at most: of 30 words, 16 + 4 x 3 are used


def labeled_scene(
    seed: str,
    number: int,
    styles: Sequence[str],
    *,
    variants: bool = False,
    beside: Sequence[Scene] = (),
) -> Scene:
    """The scene of this seed with `number` things (1 to 16), each with a sign.

    Classes and words are all different, and different from those of the scenes `beside` it; no
    class is one that another's picture shows a bit of.  Colors may repeat.
    """
    rng = random.Random(seed)
    taken = [thing.name for scene in beside for thing in scene.things]
    used = {sign.text for scene in beside for sign in scene.labels}
    names = _classes(rng, number, taken)
    words = rng.sample([word for word in WORDS if word not in used], number)
    cells = rng.sample(range(MOST), number)
    things, labels = [], []
    for name, word, cell in zip(names, words, cells, strict=True):
        x, top = CELL * (cell % ACROSS) + CELL // 2, CELL * (cell // ACROSS)
        variant = rng.randrange(60) if variants else 0
        things.append(Thing(name, rng.choice(styles), variant, x, top + 19, THING))
        labels.append(Sign(word, rng.choice(list(COLORS)), x, top + CELL - 10, *SIGN))
    return Scene(seed, rng.choice(PLACES), "", tuple(things), labels=tuple(labels))


def further_scenes(
    seed: str, scene: Scene, number: int, styles: Sequence[str], *, variants: bool = False
) -> list[Scene]:
    """`number` (at most 4) scenes to stand behind this one, of at most 3 things each."""
    scenes = [scene]
    for place in range(number):
        size = min(FURTHER, len(scene.things))
        scenes.append(
            labeled_scene(f"{seed}/{place}", size, styles, variants=variants, beside=scenes)
        )
    return scenes[1:]


def _classes(rng: random.Random, number: int, taken: Sequence[str]) -> list[str]:
    """Classes of which none is taken, nor shown in the picture of another."""
    names: list[str] = []
    for name in rng.sample(CLASSES, len(CLASSES)):
        if len(names) < number and not _confused(name, [*taken, *names]):
            names.append(name)
    return names


def _confused(name: str, others: Collection[str]) -> bool:
    shown = SHOWN_WITH.get(name, ())
    return any(o == name or o in shown or name in SHOWN_WITH.get(o, ()) for o in others)


def words_of(scene: Scene, empty: bool = True) -> str:
    """The scene told in 48 words, cell by cell in raster order: thing, color, word.

    A cell without a thing tells the background three times; nothing if not `empty`.
    """
    background = [scene.place] * 3 if empty else []
    return " ".join(word for cell in _cells(scene) for word in cell or background)


def patch_words(scene: Scene) -> list[str | None]:
    """A word for each of the 4 x 4 cells, in raster order: thing, color or word, and of the
    background in few of them."""
    rng = random.Random(f"{scene.seed}/patches")
    background = (scene.place, *[None] * 9)
    return [rng.choice(cell or background) for cell in _cells(scene)]


def _cells(scene: Scene) -> list[tuple[str, ...]]:
    """Of each cell, in raster order: thing, color and word, or nothing."""
    told: list[tuple[str, ...]] = [()] * MOST
    for thing, label in zip(scene.things, scene.labels, strict=True):
        told[thing.y // CELL * ACROSS + thing.x // CELL] = (thing.name, label.color, label.text)
    return told
