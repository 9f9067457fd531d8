"""English text to pretrain the demo's small language model: WordNet's glosses and examples.

    from vlmamba.demo.text import documents
    for line in documents(): ...

117,659 definitions and 48,265 example sentences, packed by `tools/pack_wordnet.py`.
"""

from __future__ import annotations

import functools
import itertools
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

from vlmamba.demo.vocabulary import CLASSES, COLORS, WORDS

PACKED = Path(__file__).resolve().parents[1] / "assets" / "text" / "wordnet.txt.xz"
_QUOTED = re.compile(r'"([^"]+)"')


def glosses() -> Iterator[tuple[str, str]]:
    """(comma-separated words, gloss) of every synset; the gloss still holds its examples."""
    with lzma.open(PACKED, "rt", encoding="utf-8") as file:
        for line in file:
            words, _, gloss = line.rstrip("\n").partition("\t")
            yield words, gloss


def definitions() -> Iterator[str]:
    """ "dog, domestic dog: a member of the genus Canis ..." """
    for words, gloss in glosses():
        definition = gloss.split('; "', 1)[0].strip()
        yield f"{words}: {definition}."


def examples() -> Iterator[str]:
    """Example sentences, without their quotes."""
    for _, gloss in glosses():
        _, found, quoted = gloss.partition('; "')
        if found:
            yield from (match.strip() for match in _QUOTED.findall('"' + quoted))


def documents() -> Iterator[str]:
    """All definitions, then all examples: one line each, always in the same order."""
    yield from definitions()
    yield from examples()


def filler(rng: random.Random, words: int) -> str:
    """Exactly `words` words of definitions that name nothing a demo picture shows; "" for none."""
    lines, text = neutral_definitions(), list[str]()
    while len(text) < words:
        text += rng.choice(lines).split()
    return f"{' '.join(text[:words]).rstrip('.,;:')}." if words else ""


@functools.cache
def neutral_definitions() -> tuple[str, ...]:
    """Every tenth definition, without a class, a color or a sign's word of the demo world."""
    shown = {part for name in (*CLASSES, *COLORS, *WORDS) for part in name.split()}
    named = re.compile(rf"\b(?:{'|'.join(sorted(shown))})", re.IGNORECASE)
    plain = re.compile(r"[A-Za-z ,;.:'-]+")
    some = itertools.islice(definitions(), 0, None, 10)
    return tuple(line for line in some if plain.fullmatch(line) and not named.search(line))
