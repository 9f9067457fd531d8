"""MME's question, its own yes-or-no instruction replaced by the word-or-phrase one."""

from __future__ import annotations

from tasks.common import SHORT_ANSWER

YES_OR_NO = " Please answer yes or no."


def short_question(question: str, protocol: str) -> str:
    """The question, then the instruction to answer in a word or phrase.

    Seven questions have two spaces before their instruction. LLaVA-1.5's question file has none
    left, lmms-eval leaves one.
    """
    bare = question.strip().replace(YES_OR_NO, "")
    return f"{bare.rstrip() if protocol == 'paper' else bare}\n{SHORT_ANSWER}"
