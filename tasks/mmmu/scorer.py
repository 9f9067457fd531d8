"""MMMU scoring: the option that an answer names, and whether an open answer is right.

`paper` follows mmmu/utils/eval_utils.py of MMMU-Benchmark/MMMU, `lmms` lmms-eval's mmmu_val, which
finds a letter in more places.  Both draw an option at random where they find none; here the answer
is then wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

MARKS = ",.!?;:'"  # taken off both ends of an answer, one after the other
FORMS = {"paper": ("({})", " {} "), "lmms": ("({})", "{} ", "{}.")}
LONG = 5  # words; an answer of more is searched for an option's text
PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NOTHING = (":", ",", ".", "!", "?", ";", "'")
DECIMALS = 2
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 12,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 3.14
)


def read_choice(answer: str, options: Mapping[str, str], protocol: str) -> str | None:
    """The last option that is named by letter, else by text in a long answer; None without any."""
    text = answer
    for mark in MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form in FORMS[protocol]:
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            order = form if form.startswith("(") else " {} "
            return _last({letter: text.rfind(order.format(letter)) for letter in found})
    if len(text.split()) <= LONG:
        return None
    lower = text.lower()
    places = {letter: lower.rfind(option.lower()) for letter, option in options.items()}
    return _last({letter: place for letter, place in places.items() if place >= 0})


def _last(places: Mapping[str, int]) -> str | None:
    """The letter that stands last; the first one of those that stand nowhere alone."""
    return max(places, key=lambda letter: places[letter], default=None)


def read_open(answer: str) -> list[str | float]:
    """What an open answer may mean: its key parts, and every number in them."""
    parts = _key_parts(answer)
    numbers = [number for part in parts for form in NUMBERS for number in form.findall(part)]
    return [one for text in (*parts, *numbers) for one in normalize(text)]


def _key_parts(answer: str) -> list[str]:
    """Of each line what follows a phrase such as "answer "; the whole answer without any."""
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines):
        phrases = (*PHRASES, "=") if number == len(lines) - 1 else PHRASES
        shortest = ""
        for phrase in phrases:
            if phrase in line:
                tail = line.split(phrase)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in NOTHING:
            found.append(shortest)
    return found or [text]


def normalize(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; one letter needs a space beside it."""
    bare = text.strip()
    try:
        return [round(float(bare.replace(",", "")), DECIMALS)]
    except ValueError:
        lower = bare.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def is_right(found: Iterable[str | float], accepted: Sequence[str]) -> bool:
    """Whether a text of `found` holds an accepted one, or a number of `found` equals one."""
    wanted = [one for answer in accepted for one in normalize(answer)]
    texts = [one for one in wanted if isinstance(one, str)]
    return any(
        any(text in one for text in texts) if isinstance(one, str) else one in wanted
        for one in found
    )
