"""VQAv2 scoring: soft accuracy of a normalized answer against ten people's.

`paper` is the official evaluation of the answer that LLaVA submits, which the M4C normalizer has
been through; `lmms` follows lmms-eval's vqav2 task.
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks.vqa_answers import (
    M4C_DIGIT_COMMA,
    normalize,
    one_line,
    soft_accuracy,
)


def paper_score(answer: str, references: Sequence[str]) -> tuple[str, float]:
    """The submitted answer as compared, and its accuracy in 0..1.

    Where all people agree to the letter, the official script normalizes neither side: their
    "2,000" is then not the submitted "2000".
    """
    people = [one_line(reference) for reference in references]
    if len(set(people)) > 1:
        answer = normalize(answer)
        people = [normalize(reference) for reference in people]
    return answer, soft_accuracy(answer, people)


def lmms_score(prediction: str, references: Sequence[str]) -> tuple[str, float]:
    """The answer as compared, and its accuracy in 0..1; both sides are always normalized."""
    answer = normalize(one_line(prediction), M4C_DIGIT_COMMA)
    people = [normalize(one_line(reference), M4C_DIGIT_COMMA) for reference in references]
    return answer, soft_accuracy(answer, people)
