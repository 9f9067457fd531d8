"""Caption metrics: BLEU-1..4, METEOR, ROUGE-L and CIDEr, as the COCO caption evaluation has them.

`measure` reduces every caption to the numbers that its metrics are sums or means of; `aggregate`
turns any selection of them into corpus scores, so an interval needs no second Java run.
Counting is pycocoevalcap's; the corpus formulas are written out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import exp
from typing import Any, NamedTuple

import numpy as np

from tasks.coco_cap import java
from vlmamba_core.errors import UserError

BLEU_ORDERS = 4
BLEU_TINY, BLEU_SMALL = 1e-15, 1e-9  # keep 0/0 at 0, as the official code does

# METEOR 1.5's parameters for English: module weights are exact, stem, synonym, paraphrase.
METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
WORDS, MODULES, CHUNKS, MATCHES = slice(0, 2), slice(4, 20), 20, slice(21, 23)  # of its counts
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75

Detail = dict[str, Any]


class Measured(NamedTuple):
    """One detail a caption, and metric -> reason for those that could not run."""

    details: tuple[Detail, ...]
    not_run: Mapping[str, str]


@lru_cache(maxsize=2)  # lmms-eval asks for each metric on its own
def measure(references: tuple[tuple[str, ...], ...], captions: tuple[str, ...]) -> Measured:
    """Measure raw `captions`, each against its own raw `references`.

    A detail holds "bleu" (caption length, reference length, n-grams, matched n-grams),
    "meteor" (METEOR's counts), "rouge_l" and "cider" (the caption's own scores; CIDEr weighs
    n-grams by how many of all these images' references have them), and "spice" where it ran.
    """
    everything = "BLEU-1..4, METEOR, ROUGE_L and CIDEr"
    if reason := java.why_not():
        return Measured(tuple({} for _ in captions), {everything: reason})
    refs = _split(java.tokenize([text for texts in references for text in texts]), references)
    caps = java.tokenize(captions)
    columns: dict[str, Sequence] = {
        "bleu": [bleu_counts(texts, cap) for texts, cap in zip(refs, caps, strict=True)],
        "rouge_l": _rouge_l(refs, caps),
        "cider": _cider(refs, caps),
    }
    not_run = {}
    try:
        columns["meteor"] = [meteor_counts(line) for line in java.meteor_statistics(refs, caps)]
    except UserError as error:
        not_run["METEOR"] = str(error)
    try:
        if reason := java.why_no_spice():
            not_run["SPICE"] = reason
        else:
            columns["spice"] = java.spice_scores(refs, caps)
    except UserError as error:
        not_run["SPICE"] = str(error)
    rows = zip(*columns.values(), strict=True)
    return Measured(tuple(dict(zip(columns, row, strict=True)) for row in rows), not_run)


def _split(flat: Sequence[str], like: Sequence[Sequence]) -> list[list[str]]:
    """Cut `flat` into lists as long as those of `like`."""
    items = iter(flat)
    return [[next(items) for _ in group] for group in like]


def bleu_counts(references: Sequence[str], caption: str) -> list[int]:
    """[caption length, length of the closest reference, n-grams x4, matched n-grams x4]."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    counts = cook_test(caption, cook_refs(references, n=BLEU_ORDERS), n=BLEU_ORDERS)
    length = counts["testlen"]
    closest = min(counts["reflen"], key=lambda reference: (abs(reference - length), reference))
    return [length, closest, *counts["guess"], *counts["correct"]]


def _rouge_l(references: Sequence[list[str]], captions: Sequence[str]) -> list[float]:
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return [rouge.calc_score([c], refs) for refs, c in zip(references, captions, strict=True)]


def _cider(references: Sequence[list[str]], captions: Sequence[str]) -> list[float]:
    from pycocoevalcap.cider.cider import Cider

    if not any(text for texts in references for text in texts):
        return [0.0] * len(captions)  # no word in any reference; the package cannot count none
    gold = dict(enumerate(references))
    _, scores = Cider().compute_score(gold, {i: [c] for i, c in enumerate(captions)})
    return [float(score) for score in scores]


def aggregate(details: Sequence[Detail]) -> dict[str, float]:
    """Corpus scores of the given captions; a metric that did not run is left out."""
    metrics: dict[str, float] = {}
    if all("bleu" in detail for detail in details):
        metrics |= bleu(np.sum([detail["bleu"] for detail in details], axis=0))
    if all("meteor" in detail for detail in details):
        metrics["METEOR"] = meteor(np.sum([detail["meteor"] for detail in details], axis=0))
    for metric, key in (("ROUGE_L", "rouge_l"), ("CIDEr", "cider"), ("SPICE", "spice")):
        if all(key in detail for detail in details):
            metrics[metric] = float(np.mean([detail[key] for detail in details]))
    return metrics


def bleu(counts: np.ndarray) -> dict[str, float]:
    """BLEU-1..4 of summed counts: geometric mean of the n-gram precisions, brevity penalty."""
    length, closest = counts[:2]
    possible, matched = counts[2 : 2 + BLEU_ORDERS], counts[2 + BLEU_ORDERS :]
    precisions = (matched + BLEU_TINY) / (possible + BLEU_SMALL)
    ratio = (length + BLEU_TINY) / (closest + BLEU_SMALL)
    penalty = exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return {
        f"BLEU-{n}": float(np.prod(precisions[:n]) ** (1 / n) * penalty)
        for n in range(1, BLEU_ORDERS + 1)
    }


def meteor_counts(statistics: Sequence[float]) -> list[float]:
    """A caption's statistics with the chunk of a sentence matched whole, in one piece, left out.

    They are: words of caption and reference; function words of both; for each of the four modules
    matched content words of both and matched function words of both; chunks; matches of both.
    """
    counts = list(statistics)
    if counts[CHUNKS] == 1 and counts[MATCHES] == counts[WORDS]:
        counts[CHUNKS] = 0.0
    return counts


def meteor(counts: np.ndarray) -> float:
    """METEOR of summed `meteor_counts` (Denkowski and Lavie, 2014, section 3.1)."""
    words, function_words = counts[WORDS], counts[2:4]
    matched = METEOR_WEIGHTS @ counts[MODULES].reshape(4, 4)  # content of both, function of both

    def weighted(content: np.ndarray, function: np.ndarray) -> np.ndarray:
        return METEOR_DELTA * content + (1 - METEOR_DELTA) * function

    found = weighted(matched[:2], matched[2:])
    wanted = weighted(words - function_words, function_words)
    if not found.all():
        return 0.0
    precision, recall = found / wanted
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    fragmentation = counts[CHUNKS] / counts[MATCHES].mean()
    return float((1 - METEOR_GAMMA * fragmentation**METEOR_BETA) * mean)
