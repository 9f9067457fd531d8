"""MMBench's multiple-choice question; the protocols order and frame its parts differently."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from tasks.common import OPTION_LETTER


def is_empty(cell: Any) -> bool:
    """True for a cell without text: None, NaN, "" or the text "nan" that a hub copy has."""
    return cell is None or cell != cell or str(cell).lower() in ("", "nan")


def paper_question(doc: Mapping[str, Any], instruction: str = OPTION_LETTER) -> str:
    """LLaVA-1.5: hint line, question, options A-D up to the first empty one, instruction.

    Its script takes "none" for an empty cell, too.
    """

    def filled(column: str) -> bool:
        return not is_empty(doc.get(column)) and str(doc[column]).lower() != "none"

    hint = [str(doc["hint"])] if filled("hint") else []
    options = [f"{letter}. {doc[letter]}" for letter in takewhile(filled, "ABCD")]
    return "\n".join([*hint, doc["question"], *options, instruction])


def lmms_question(
    doc: Mapping[str, Any], instruction: str = OPTION_LETTER, nan_is_a_hint: bool = False
) -> str:
    """lmms-eval: hint and question on one line, "There are several options:", A-E, instruction.

    A blank line comes before the instruction. Some of its tasks show the text "nan" as a hint.
    """

    def filled(column: str) -> bool:
        cell = doc.get(column)
        return not (cell is None or cell != cell or cell == "nan")

    nan = nan_is_a_hint and doc.get("hint") == "nan"
    hint = f"{doc['hint']} " if filled("hint") or nan else ""
    options = [f"{letter}. {doc[letter]}" for letter in "ABCDE" if filled(letter) and doc[letter]]
    listed = "\n".join([f"{hint}{doc['question']} There are several options:", *options])
    return f"{listed.rstrip(chr(10))}\n\n{instruction}"
