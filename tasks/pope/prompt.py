"""POPE's question as LLaVA-1.5 and lmms-eval both ask it."""

from __future__ import annotations

from tasks.common import SHORT_ANSWER


def short_question(question: str) -> str:
    """The question, then the instruction to answer in a word or phrase."""
    return f"{question.strip()}\n{SHORT_ANSWER}"
