"""POPE scoring: is an answer a yes or a no, and what the counts of both amount to.

`paper` follows llava/eval/eval_pope.py (any answer without a negation is a yes), `lmms` follows
lmms-eval's pope task (the whole answer must be the word).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean

NEGATIONS = {"No", "no", "not"}

# (truth, what the answer was read as) -> number of questions
Counts = Counter[tuple[str | None, str | None]]


def read_paper(answer: str) -> str:
    """ "no" if the first sentence holds a negation as a word of its own, else "yes".

    Words are split at spaces alone and keep their case: "NO", "isn't", "no!" and "" are yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def read_lmms(answer: str) -> str | None:
    """The answer when it is nothing but yes or no, in any case; None for every other text."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else None


def measures(counts: Counts, protocol: str) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes-ratio; a ratio with nothing to divide by is 0.

    The protocols differ where an answer was neither yes nor no (recall leaves it out under
    `lmms`) and in the yes-ratio: of the answers under `paper`, of the truth under `lmms`.
    """
    total = counts.total()
    true_yes = counts["yes", "yes"]
    said_yes = true_yes + counts["no", "yes"]
    was_yes = sum(n for (truth, _), n in counts.items() if truth == "yes")
    missed = counts["yes", "no"]
    precision = _ratio(true_yes, said_yes)
    recall = _ratio(true_yes, true_yes + missed)
    return {
        "f1": _ratio(2 * precision * recall, precision + recall),
        "accuracy": _ratio(true_yes + counts["no", "no"], total),
        "precision": precision,
        "recall": recall,
        "yes_ratio": _ratio(said_yes if protocol == "paper" else was_yes, total),
    }


def summarize(by_category: Mapping[str, Counts], protocol: str) -> dict[str, float]:
    """Overall measures, then `<category>/<measure>` for each category.

    Under `paper` the overall F1 is the mean of the categories' F1, as papers report it;
    lmms-eval pools all questions instead. The other overall measures are pooled in both.
    """
    overall = measures(sum(by_category.values(), Counter()), protocol)
    each = {category: measures(counts, protocol) for category, counts in by_category.items()}
    if protocol == "paper":
        overall["f1"] = fmean(scores["f1"] for scores in each.values())
    return overall | {
        f"{category}/{key}": value
        for category, scores in each.items()
        for key, value in scores.items()
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
