"""TextVQA scoring: soft accuracy after the M4C normalizer, on both sides, in both protocols.

Sources: TextVQAAccuracyEvaluator in llava/eval/m4c_evaluator.py; lmms-eval's textvqa task.
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks.vqa_answers import m4c_normalize, soft_accuracy


def score(answer: str, references: Sequence[str]) -> float:
    """Accuracy in 0..1 of a normalized answer against people's answers as they wrote them."""
    return soft_accuracy(answer, [m4c_normalize(reference) for reference in references])
