"""ScienceQA scoring: which option letter does an answer give?

`paper` follows llava/eval/eval_science_qa.py, `lmms` follows lmms-eval's scienceqa task.
"""

from __future__ import annotations

import re

LETTERS = "ABCDE"
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # one more character must follow the letter


def read_paper(answer: str) -> str | None:
    """The letter when the answer is nothing else, starts "B. ", or says "The answer is B." once.

    Case counts. The third form takes any character but a newline after the letter, and any
    letter A-Z, even one that no option has.
    """
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if answer[:1] and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = ANSWER_IS.findall(answer)
    return found[0] if len(found) == 1 else None


def read_lmms(answer: str) -> str | None:
    """The letter when the stripped answer is one character, in any case, or starts "B."."""
    text = answer.strip()
    if len(text) == 1:
        return text.upper()
    return text[0] if text[1:2] == "." and text[0].isupper() else None
