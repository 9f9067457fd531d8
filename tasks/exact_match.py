"""Exact match of one short answer, as LLaVA with GQA's script and as lmms-eval decide it."""

from __future__ import annotations

import string
from collections.abc import Sequence

from tasks.common import Doc

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def parse(prediction: str, protocol: str) -> str:
    """The answer as compared.

    `paper`: stripped, trailing full stops removed, lower case (LLaVA's convert_gqa_for_eval.py).
    `lmms`: lower case without ASCII punctuation (lmms-eval's exact_match metric).
    """
    if protocol == "paper":
        return prediction.strip().rstrip(".").lower()
    return _lower_without_punctuation(prediction.strip())


def comparable(reference: str, protocol: str) -> str:
    """The reference as compared: as it stands under `paper`, treated like answers under `lmms`."""
    return reference if protocol == "paper" else _lower_without_punctuation(reference)


def _lower_without_punctuation(text: str) -> str:
    # lmms-eval holds texts in numpy: lower case cannot get longer, trailing NULs are not kept.
    lower = text.rstrip("\0").lower()[: len(text)]
    return lower.translate(NO_PUNCTUATION).rstrip("\0")


def missing_answers(docs: Sequence[Doc]) -> dict[int, str]:
    """Row -> reason for the rows whose "answer" is hidden, empty or not text."""
    return {
        row: "no reference answer"
        for row, doc in enumerate(docs)
        if not (isinstance(doc["answer"], str) and doc["answer"].strip())
    }
