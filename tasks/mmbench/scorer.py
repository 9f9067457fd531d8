"""MMBench scoring: which option does an answer give, without asking a judge model?

`paper` follows VLMEvalKit's exact matching (vlmeval/utils/matching_util.py, read August 2026),
`lmms` follows lmms-eval's mmbench_en_dev_static. Both look for an option's letter first and for
an option's text second; lmms-eval then searches a third time, more freely.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

REFUSED = "Z"
NO_REPLY = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
LAST_WORDS = 4  # an option letter counts only if it comes this late in the answer


def read_paper(answer: str, options: Mapping[str, str]) -> str | None:
    """The option letter, "Z" for a refusal, or None. `options`: letter -> text, none empty."""
    return _letter_paper(answer, options) or _text_paper(answer, options)


def _letter_paper(answer: str, options: Mapping[str, str]) -> str | None:
    if NO_REPLY in answer:
        return None
    if any(refusal in answer for refusal in REFUSALS):
        return REFUSED
    words = answer.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - LAST_WORDS:
        return letters[0]
    if not letters and REFUSED in words:
        return REFUSED
    stated = ANSWER_IS.search(answer)  # "the answer is a cat" reads as A, there as here
    letter = stated.group(1).upper() if stated else None
    return letter if letter in options else None


def _text_paper(answer: str, options: Mapping[str, str]) -> str | None:
    too_long = len(answer.lower()) > 2 * sum(map(len, options.values()))
    return None if too_long else _only_text(answer, options)


def _only_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text the answer holds, in any case; None for none or several."""
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


# How lmms-eval finds a letter among the words: (before it, after it), first hit decides.
FRAMES = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ").")),
    *(("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)
# Its third search: marks around a letter, anywhere in the text, the earlier pattern wins.
MARKS = ("({})", "{}.", "{}:", "{})", "{} ")
_STATED = (
    *("answer is", "correct answer is", "best answer is"),
    *("correct option is", "best option is"),
    *("choice is", "correct choice is"),
)
PHRASES = (
    *_STATED,
    *(f"the {phrase}" for phrase in _STATED),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def read_lmms(answer: str, options: Mapping[str, str]) -> str | None:
    """The option letter or None. `options`: letters A-D -> text, where "nan" is a text too."""
    answer = answer.strip()
    return (
        _letter_lmms(answer)
        or _only_text(answer, options)
        or _search_lmms(answer, sorted(options) or "ABCDEFGH")
    )


def _letter_lmms(answer: str) -> str | None:
    if NO_REPLY in answer:
        return None
    words = answer.split()
    bare = [letter for letter in "ABCDE" if letter in words]
    article = "A" in words and len(words) > 3  # then "A" may be the first word of a sentence
    if len(bare) == 1 and not article:
        return bare[0]
    for before, after in FRAMES:
        framed = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(framed) == 1:
            return framed[0]
    return None


def _search_lmms(answer: str, letters: Sequence[str]) -> str | None:
    """Start of the text, then its end, then stated, marked, and any letters; the last one wins."""
    bare = answer.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    text, bare = f" {bare} ", bare.strip()
    if bare[:1] in letters and bare[:1] and not bare[1:2].isalpha():
        return bare[0]
    if bare[-1:] in letters and bare[-1:] and not bare[-2:-1].isalpha():
        return bare[-1]
    searches: list[Iterable[tuple[int, str]]] = [_stated(text, letters)]
    searches += [_marked(text, letters, mark) for mark in (*MARKS, "{}")]
    found = (max(hits, key=lambda hit: hit[0]) for search in searches if (hits := list(search)))
    return next((letter for _, letter in found), None)


def _stated(text: str, letters: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(position, letter) of each letter's first appearance after a phrase's first one."""
    for phrase in PHRASES:
        start = text.lower().find(phrase)
        if start != -1:
            for letter in letters:
                position = text.find(letter, start + len(phrase))
                if position != -1:
                    yield position, letter


def _marked(text: str, letters: Sequence[str], mark: str) -> Iterator[tuple[int, str]]:
    """(position, letter) of each letter's last appearance inside the mark."""
    for letter in letters:
        position = text.rfind(mark.format(letter))
        if position != -1:
            yield position, letter
