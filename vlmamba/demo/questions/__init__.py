"""Questions about a scene, with their answers: the one source of training turns and benchmarks.

An asker takes (scene, rng) and gives a question, or None where the scene does not allow it:
`PAIRS` ask with yes and no (MME's subtasks), `OPEN` for a word or a number (VQAv2, GQA, TextVQA),
`CHOICES` give options (ScienceQA, MMBench).  Whether a class is there is asked through `Existence`,
which keeps yes and no in balance class by class, so that the question alone gives nothing away.
"""

from vlmamba.demo.questions.base import Existence, Pair, Question, absent, half, sign_word
from vlmamba.demo.questions.captions import captions
from vlmamba.demo.questions.choices import CHOICES, TEXT_ONLY
from vlmamba.demo.questions.labeled import Presence
from vlmamba.demo.questions.pairs import PAIRS
from vlmamba.demo.questions.short import OPEN, READ_TEXTS

__all__ = [
    "CHOICES",
    "OPEN",
    "PAIRS",
    "READ_TEXTS",
    "TEXT_ONLY",
    "Existence",
    "Pair",
    "Presence",
    "Question",
    "absent",
    "captions",
    "half",
    "sign_word",
]
