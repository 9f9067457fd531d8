"""Sentences that tell what a scene shows."""

from __future__ import annotations

import random

from vlmamba.demo.vocabulary import counted
from vlmamba.demo.world import Scene


def captions(scene: Scene, rng: random.Random, number: int) -> list[str]:
    """`number` different sentences that tell what the scene shows (at most 5)."""
    things = [counted(name, n) for name, n in scene.counts.items()]
    if scene.sign:
        things.append(f"a {scene.sign.color} sign")
    items = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    place = scene.place
    sentences = [
        f"{items} with {place} in the background.",
        f"{items} in front of {place}.",
        f"a picture of {items} with {place} behind.",
        f"there is {items} and {place} in the background.",
        f"the background shows {place}, the front shows {items}.",
    ]
    chosen = [sentences[0], *rng.sample(sentences[1:], 4)][:number]
    return [sentence[0].upper() + sentence[1:] for sentence in chosen]
