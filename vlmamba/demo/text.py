"""English text to pretrain the demo's small language model: WordNet's glosses and examples.

    from vlmamba.demo.text import documents
    for line in documents(): ...

117,659 definitions and 48,265 example sentences, packed by `tools/pack_wordnet.py`.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

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
