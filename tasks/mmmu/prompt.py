"""MMMU's two kinds of question. `<image 1>` in a text names an image; it stays as it is.

All images stand before the text, as in MMMU's run_llava.py and in lmms-eval's mmmu_val.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.common import OPTION_LETTER, SHORT_ANSWER


def choice_question(question: str, options: Mapping[str, str], protocol: str) -> str:
    """Question, options "(A) text" (`paper`) or "A. text" (`lmms`), empty line, instruction."""
    form = "({}) {}" if protocol == "paper" else "{}. {}"
    listed = [form.format(letter, text) for letter, text in options.items()]
    return "\n".join([question, *listed, "", OPTION_LETTER])


def open_question(question: str, protocol: str) -> str:
    """Question and instruction, with an empty line between them under `lmms`."""
    return f"{question}\n{'' if protocol == 'paper' else chr(10)}{SHORT_ANSWER}"
