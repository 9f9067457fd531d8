"""Lists in the cells of a table, where everything is text.

    read_list("['a cat', 'the cat']")     # ["a cat", "the cat"]; JSON's form is read too

pandas and VLMEvalKit write a list as Python does; VLMEvalKit evaluates the cell when it scores.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
from typing import Any

UNREADABLE = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
# What Python's tokens put between two strings of one expression.
BETWEEN = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)


def looks_like_list(text: str) -> bool:
    """Whether `text` stands in square brackets, or writes a list or tuple."""
    bare = text.strip()
    return (bare[:1] + bare[-1:]) == "[]" or read_list(bare) is not None


def read_list(text: str) -> list[Any] | None:
    """The list or tuple that `text` writes in Python's or JSON's form; None where it writes none.

    An array as numpy prints it (['cat' 'dog']) has no commas. Python would join its texts into one,
    so it is not read.
    """
    try:
        value = json.loads(text)
    except UNREADABLE:
        try:
            value = None if _has_joined_texts(text) else ast.literal_eval(text.strip())
        except UNREADABLE:
            return None
    return list(value) if isinstance(value, list | tuple) else None


def _has_joined_texts(text: str) -> bool:
    """Whether two strings follow each other without a comma."""
    before = None
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type == tokenize.STRING == before:
                return True
            before = before if token.type in BETWEEN else token.type
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error
    return False
