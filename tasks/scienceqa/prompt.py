"""ScienceQA's multiple-choice question, as LLaVA-1.5 and lmms-eval ask it."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from tasks.common import OPTION_LETTER


def choice_question(hint: str | None, question: str, choices: Sequence[str], protocol: str) -> str:
    """Context line (when there is a hint), question, lettered choices, instruction.

    `paper` strips the whole block before the instruction, as LLaVA-1.5's script does.
    Raises TypeError for choices that are no list.
    """
    if not isinstance(choices, list | tuple):
        raise TypeError("expected a list")
    context = f"Context: {hint}\n" if hint else ""
    listed = "\n".join(
        f"{letter}. {c}" for letter, c in zip(ascii_uppercase, choices, strict=False)
    )
    block = f"{context}{question}\n{listed}"
    return f"{block.strip() if protocol == 'paper' else block}\n{OPTION_LETTER}"
