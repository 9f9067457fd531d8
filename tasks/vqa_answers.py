"""Answers to open questions as VQAv2 and TextVQA compare them: normalized text, soft accuracy.

Two normalizers share their steps: the one of the official VQA evaluation and the one of the M4C
evaluator, which LLaVA applies to TextVQA and, before submission, to VQAv2.
Sources: vqaEvaluation/vqaEval.py of GT-Vision-Lab/VQA, llava/eval/m4c_evaluator.py of LLaVA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from tasks.common import Benchmark, Doc

ANSWERS_PER_QUESTION = 10  # people asked per question, in VQAv2 and in TextVQA
MATCHES_FOR_FULL_SCORE = 3

MARKS = ';/[]"{}()=+\\_-><@`,?!'
OFFICIAL_DIGIT_COMMA = re.compile(r"\d,\d")
M4C_DIGIT_COMMA = re.compile(r"\d,+\d")  # several commas in a row count too
FULL_STOP = re.compile(r"\.(?!\d)")
MAX_FULL_STOPS = 32  # both evaluators pass re.UNICODE, 32, where re.sub takes a count

ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(n) for n, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# The evaluators restore a contraction that lacks one of its apostrophes. Their tables also hold
# entries that never change an answer (capitalised, or mapped to themselves); these are left out.
# "somebody'd" is theirs: alone in the table, it loses its apostrophe.
CONTRACTIONS = {lame: word for word in CONTRACTED.split() for lame in _without_one_apostrophe(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"


def one_line(text: str) -> str:
    """`text` with newlines and tabs as spaces, stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=2**16)  # "yes", "no" and "2" are most of the answers
def normalize(text: str, digit_comma: re.Pattern[str] = OFFICIAL_DIGIT_COMMA) -> str:
    """The official VQA form: no punctuation, articles or number words; contractions restored."""
    words = (DIGITS.get(word, word) for word in _strip_marks(text, digit_comma).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip_marks(text: str, digit_comma: re.Pattern[str]) -> str:
    """A mark becomes a space; next to a space, or if `text` has a comma in a number, nothing."""
    joined = digit_comma.search(text) is not None
    kept = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if joined or beside_space else " ")
    return FULL_STOP.sub("", kept, count=MAX_FULL_STOPS)


def m4c_normalize(text: str) -> str:
    """The M4C form: commas, question marks and possessive "'s" are split off first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize(one_line(text), M4C_DIGIT_COMMA)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over the subsets that leave one reference out; in 0..1."""
    matches = sum(reference == answer for reference in references)
    with_match_left_out = matches * _credit(matches - 1)
    with_other_left_out = (len(references) - matches) * _credit(matches)
    return (with_match_left_out + with_other_left_out) / len(references)


def _credit(matches: int) -> float:
    return min(1.0, matches / MATCHES_FOR_FULL_SCORE)


def references(doc: Doc) -> list[str] | None:
    """The people's answers in `doc["answers"]`: texts, records with an "answer", or a record of
    columns with an "answer".

    None where they are hidden: absent, not text, or all blank.
    """
    answers = doc["answers"]
    if isinstance(answers, Mapping):
        answers = answers.get("answer")
    if isinstance(answers, str) or not isinstance(answers, Iterable):
        return None
    items = [item.get("answer") if isinstance(item, Mapping) else item for item in answers]
    texts = [item for item in items if isinstance(item, str)]
    return texts if len(texts) == len(items) and any(text.strip() for text in texts) else None


def missing_references(docs: Sequence[Doc], needed: int | None) -> dict[int, str]:
    """Row -> reason for the rows without reference answers, or without exactly `needed` ones."""
    reasons = {}
    for row, doc in enumerate(docs):
        texts = references(doc)
        if texts is None:
            reasons[row] = "no reference answers"
        elif needed is not None and len(texts) != needed:
            reasons[row] = f"not {needed} reference answers"
    return reasons


class HumanAnswers(Benchmark):
    """A benchmark whose reference is what ten people answered."""

    primary_metric = "accuracy"
    text_is_no_reference = ("answers",)
    cluster_columns: tuple[str, ...] = ("image_id", "question_id")

    def to_submit(self, prediction: str) -> str:
        """The answer as LLaVA uploads it: through the M4C normalizer, but not a second time."""
        return one_line(prediction) if self.submitted else m4c_normalize(prediction)

    def reference(self, doc: Doc) -> list[str] | None:
        """The people's answers; None where they are hidden."""
        return references(doc)

    def exclude(self, docs: Sequence[Doc], protocol: str) -> dict[int, str]:
        return missing_references(docs, ANSWERS_PER_QUESTION if protocol == "paper" else None)
