"""What a demo picture shows: sampling of scenes, all by seed.

A `Scene` is a background, one to five things (class, style, place, size) and sometimes a sign with
a word.  `render.render` draws it; `questions` asks about it.  Scenes of different splits come from
different seeds, and the splits "train" and "validation" hold no picture of the held-out style.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from vlmamba.demo.vocabulary import (
    COLORS,
    HELDOUT_STYLES,
    PLACES,
    SHOWN_WITH,
    SUMS,
    THEMES,
    TRAINING_STYLES,
    WORDS,
)
from vlmamba_core.names import choose

SIDE = 224  # pixels, of a picture
SPLITS: dict[str, tuple[str, ...]] = {  # split -> emoji styles
    "train": TRAINING_STYLES,
    "validation": TRAINING_STYLES,  # for tuning: new scenes, seen pictures
    "seen": TRAINING_STYLES,
    "heldout": HELDOUT_STYLES,
}
STYLES = (*TRAINING_STYLES, *HELDOUT_STYLES)


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y`: its center; `size`: its longer side (pixels)."""

    name: str
    style: str
    variant: int  # draws the picture among the class's pictures, modulo their number
    x: int
    y: int
    size: int
    card: str | None = None  # color of the card behind it


@dataclass(frozen=True)
class Sign:
    """A colored plate with a text; `x`, `y` its center, `width`, `height` in pixels."""

    text: str
    color: str
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Scene:
    """All that a picture shows, and the seed of its rendering."""

    seed: str
    place: str
    theme: str
    things: tuple[Thing, ...]
    sign: Sign | None = None
    labels: tuple[Sign, ...] = ()  # of every thing its own, or none at all (`demo.labeled`)

    @property
    def counts(self) -> Counter[str]:
        """Class -> number of things, in order of appearance."""
        return Counter(thing.name for thing in self.things)

    @property
    def hidden(self) -> set[str]:
        """Absent classes that a present picture shows a bit of: never asked about."""
        shown = {other for name in self.counts for other in SHOWN_WITH.get(name, ())}
        return shown - set(self.counts)

    def only(self, name: str) -> Thing | None:
        """The thing of this class when there is exactly one."""
        found = [thing for thing in self.things if thing.name == name]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class SceneOptions:
    """What to sample: chances, and what a benchmark needs in every scene."""

    styles: tuple[str, ...] = TRAINING_STYLES
    classes: tuple[int, ...] = (1, 2, 2, 3, 3, 3, 4, 4, 5)  # numbers of distinct classes
    repeat_chance: float = 0.5  # of several things of one class
    card_chance: float = 0.25  # per thing
    sign_chance: float = 0.35
    sum_chance: float = 0.15  # a sign shows a sum instead of a word
    stray_chance: float = 0.12  # per class, of coming from another theme
    variants: bool = False  # all pictures of a class, not just its own


def split_styles(split: str) -> tuple[str, ...]:
    """The emoji styles of a split. Raises UserError for an unknown split."""
    return SPLITS[choose("split", split, SPLITS)]


def sample_scene(seed: str, options: SceneOptions) -> Scene:
    """The scene of this seed; equal arguments give equal scenes on every machine."""
    rng = random.Random(seed)
    theme = rng.choice(list(THEMES))
    text = _sample_text(rng, options)
    room = 5 if text is None else 3
    names = _sample_classes(rng, theme, min(rng.choice(options.classes), room), options)
    if len(names) < room and rng.random() < options.repeat_chance:
        names += [rng.choice(names)] * rng.randint(1, min(3, room - len(names)))
    rng.shuffle(names)
    boxes, sign_box = _layout(rng, len(names), text is not None)
    things = tuple(
        Thing(
            name=name,
            style=rng.choice(options.styles),
            variant=rng.randrange(60) if options.variants else 0,
            x=x,
            y=y,
            size=size,
            card=rng.choice(list(COLORS)) if rng.random() < options.card_chance else None,
        )
        for name, (x, y, size) in zip(names, boxes, strict=True)
    )
    sign = None if text is None else Sign(text, rng.choice(list(COLORS)), *sign_box)
    return Scene(seed, rng.choice(PLACES), theme, things, sign)


def _sample_text(rng: random.Random, options: SceneOptions) -> str | None:
    if rng.random() >= options.sign_chance:
        return None
    return rng.choice(SUMS if rng.random() < options.sum_chance else WORDS)


def _sample_classes(
    rng: random.Random, theme: str, number: int, options: SceneOptions
) -> list[str]:
    """Distinct classes, mostly the theme's, its first ones most often."""
    names: list[str] = []
    while len(names) < number:
        stray = rng.random() < options.stray_chance
        pool = THEMES[rng.choice(list(THEMES)) if stray else theme]
        weights = [1 / (2 + rank) for rank in range(len(pool))]
        name = rng.choices(pool, weights)[0]
        if name not in names:
            names.append(name)
    return names


def _layout(
    rng: random.Random, things: int, sign: bool
) -> tuple[list[tuple[int, int, int]], tuple[int, int, int, int]]:
    """Boxes (x, y, size) of the things and (x, y, width, height) of the sign, hardly overlapping.

    Up to four slots are quadrants; five things take a grid of 3 x 2.  A sign takes a quadrant, or
    a whole half of the picture when two things at most share it.
    """
    sign_box = (0, 0, 0, 0)
    if things + sign > 4:
        columns, rows, sizes = (3, 2, (70, 84)) if rng.random() < 0.5 else (2, 3, (70, 84))
    else:
        columns, rows, sizes = 2, 2, (84, 108)
    cells = [(column, row) for row in range(rows) for column in range(columns)]
    if sign and things <= 2 and rng.random() < 0.7:
        row = rng.randrange(2)
        cells = [cell for cell in cells if cell[1] != row]
        width, height = rng.randint(170, 210), rng.randint(64, 90)
        sign_box = (112 + rng.randint(-6, 6), 56 + 112 * row + rng.randint(-8, 8), width, height)
    elif sign:
        column, row = cells.pop(rng.randrange(4))
        width, height = rng.randint(98, 108), rng.randint(44, 60)
        x, y = 56 + 112 * column, 56 + 112 * row
        sign_box = (x, y + rng.randint(-12, 12), width, height)
    rng.shuffle(cells)
    boxes = []
    for column, row in cells[:things]:
        size = rng.randint(*sizes)
        free_x, free_y = max(4, SIDE // columns - size), max(4, SIDE // rows - size)
        x = round((column + 0.5) * SIDE / columns) + rng.randint(-free_x // 2, free_x // 2)
        y = round((row + 0.5) * SIDE / rows) + rng.randint(-free_y // 2, free_y // 2)
        boxes.append((x, y, size))
    return boxes, sign_box
