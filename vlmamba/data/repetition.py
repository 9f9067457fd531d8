"""Answers that repeat themselves: a filter by rules as InternVL 2.5 has (2412.05271).

Such samples, it found, teach a model to repeat itself without end.  Its rules are named, not
published (long runs of zeros, duplicate lines); these are ours, wide enough for lists and tables.
What a language model judged there, by a score of quality and one of repetition, is not here.
"""

from __future__ import annotations

import re
from collections import Counter

RUN = re.compile(r"(\S)\1{31}")  # one character, 32 times
LINES = 4  # a line of some length may stand so often
LINE_CHARACTERS = 12
PHRASE_WORDS = 4
PHRASE_TIMES = 8  # a phrase may stand so often,
PHRASE_SHARE = 0.5  # or fill so much of the text


def repetition(answer: str) -> str | None:
    """What is repeated in an answer, as the reason that a sample is left out; None: nothing."""
    if RUN.search(answer):
        return "an answer with a long run of one character"
    stripped = (line.strip() for line in answer.splitlines())
    lines = Counter(line for line in stripped if len(line) >= LINE_CHARACTERS)
    if lines and max(lines.values()) > LINES:
        return "an answer with duplicate lines"
    words = answer.lower().split()
    phrases = Counter(zip(*(words[n:] for n in range(PHRASE_WORDS)), strict=False))
    if phrases:
        times = max(phrases.values())
        if times > PHRASE_TIMES and times * PHRASE_WORDS > PHRASE_SHARE * len(words):
            return "an answer that repeats a phrase"
    return None
