"""A scene told in words, patch by patch: what the demo's language model learns to look things up in
before it is given pictures.

    in_words(scene, rng)   ->   "grass grass dog dog grass red dog ..."

One word or name for each cell of the encoder's 7 x 7 grid, in raster order, as the connector will
later write one vector for each patch.  A language model that answers questions about such a text
needs to learn only one thing more when pictures come: how a patch is written.
"""

from __future__ import annotations

import random
from itertools import cycle

from vlmamba.demo.world import SIDE, Scene, Sign, Thing

GRID = 7  # cells on a side
CELL = SIDE // GRID  # pixels
EMPTY_TOLD = 0.1  # of the empty places whose background is a patch's word
OVERSEEN = 0.1  # of the cells whose word was told before: background instead


def in_words(scene: Scene, rng: random.Random) -> str:
    """The 49 words; a sign and a thing on a card alternate between what can be said of them."""
    phrases: dict[Thing | Sign, cycle[str]] = {}
    for thing in scene.things:
        words = [thing.name, thing.card] if thing.card else [thing.name]
        phrases[thing] = cycle(words)
    sign = scene.sign
    if sign:
        phrases[sign] = cycle(rng.sample([sign.text, sign.color, sign.text, "sign"], 4))
    cells: list[str] = []
    for row in range(GRID):
        for column in range(GRID):
            shown = _shown(scene, CELL * column + CELL // 2, CELL * row + CELL // 2)
            told = scene.place if shown is None else next(phrases[shown])
            if shown is not sign and told in cells and rng.random() < OVERSEEN:
                told = scene.place
            cells.append(told)
    return " ".join(cells)


def patch_words(scene: Scene) -> list[str | None]:
    """A word for each of the 7 x 7 places, in raster order: one of what can be said of what it
    shows, and of the background in few of its places, of which most pictures are full."""
    rng = random.Random(f"{scene.seed}/patches")
    found: list[str | None] = []
    for place in range(GRID * GRID):
        row, column = divmod(place, GRID)
        shown = _shown(scene, CELL * column + CELL // 2, CELL * row + CELL // 2)
        if shown is None:
            found.append(scene.place if rng.random() < EMPTY_TOLD else None)
        elif isinstance(shown, Sign):
            found.append(rng.choice((shown.text, shown.color)))
        else:
            found.append(rng.choice(tuple(filter(None, (shown.name, shown.card)))))
    return found


def _shown(scene: Scene, x: int, y: int) -> Thing | Sign | None:
    """The thing or sign at a point of the picture; None for the background."""
    if scene.sign:
        sign = scene.sign
        if abs(x - sign.x) <= sign.width / 2 and abs(y - sign.y) <= sign.height / 2:
            return sign
    reach = [(max(abs(x - t.x), abs(y - t.y)) - t.size / 2, n) for n, t in enumerate(scene.things)]
    distance, nearest = min(reach)
    return scene.things[nearest] if distance <= 0 else None
