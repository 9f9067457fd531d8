"""What was expected of the controlled study, written down before its runs, and what became of it.

The rule, fixed beforehand: a prediction has an interval of 1 - 0.05 / (number of predictions), of
the hierarchical bootstrap.  "above m" has held where the whole interval is above m, has failed
where it is wholly below, and is undecided else.  "within m" has held where the interval lies
between -m and m, has failed where it lies wholly outside, and is undecided else.  Two
models that answer all alike, as before they have learnt, decide nothing.  Where there are cells
from several text pretrainings, the one with the most seeds of a contrast decides, else the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.controlled import contrasts
from harness.controlled.contrasts import Contrast
from harness.controlled.design import SIGNS
from harness.controlled.outcomes import RETRIEVAL, Outcome, benchmark
from harness.controlled.records import Records

ALPHA = 0.05
HELD, FAILED, UNDECIDED, NOT_RUN = "held", "failed", "undecided", "not run yet"
_RETRIEVAL = {outcome.name: outcome for outcome in RETRIEVAL}
OF_CONNECTORS = {"signs": _RETRIEVAL[SIGNS], "GQA": benchmark("gqa")}  # what theirs are about


@dataclass(frozen=True)
class Prediction:
    """contrast: of the records and a text pretraining.  outcome: None: updates until picture use.

    claim: "above" or "within"; margin: a share of 1, or updates.
    """

    says: str
    because: str
    contrast: Callable[[Records, int], Contrast]
    outcome: Outcome | None
    claim: str
    margin: float

    @property
    def rule(self) -> str:
        """The claim in figures."""
        if self.outcome is None:
            return f"{self.claim} {self.margin:.0f} updates"
        return f"{self.claim} {100 * self.margin:.0f} points"


@dataclass(frozen=True)
class Verdict:
    """value, low, high: None where the cells are not there yet."""

    word: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    start: int = 1


def families(a: str, b: str) -> Callable[[Records, int], Contrast]:
    """a minus b over all connectors."""
    return lambda kept, start: contrasts.between_families(kept, a, b, start)


def connectors(a: str, b: str) -> Callable[[Records, int], Contrast]:
    """a minus b over all families that have both."""
    return lambda kept, start: contrasts.between_connectors(kept, a, b, start)


def of_order(family: str, order: str) -> Callable[[Records, int], Contrast]:
    """An order minus the usual one, with the first connector."""
    return lambda _, start: contrasts.of_order(family, "mlp", order, start)


PREDICTIONS = (
    Prediction(
        "Attention finds one sign among 8 or 16 better than Mamba.",
        "In-context multimodal retrieval separates Pythia from Mamba (2409.05395).",
        families("attention", "mamba"),
        _RETRIEVAL["many"],
        "above",
        0.0,
    ),
    Prediction(
        "One attention layer among five of Mamba is enough to be better than Mamba at it.",
        "A hybrid with 7 % attention wins all of 12 comparisons (2406.07887).",
        families("hybrid", "mamba"),
        _RETRIEVAL["many"],
        "above",
        0.0,
    ),
    Prediction(
        "The hybrid finds signs as well as attention does.",
        "The same; few attention layers close most of the gap (mmMamba).",
        families("hybrid", "attention"),
        _RETRIEVAL[SIGNS],
        "within",
        0.05,
    ),
    Prediction(
        "Whether a thing is there at all, Mamba tells as well as attention.",
        "POPE is 85.2 without and 87.6 with 32 attention layers, TextVQA 47.7 and 66.0 (mmMamba).",
        families("mamba", "attention"),
        _RETRIEVAL["existence"],
        "within",
        0.05,
    ),
    Prediction(
        "So it is on POPE.",
        "The same, and 2409.05395: 87.33 for Mamba, 86.87 for Pythia at 2.8B.",
        families("mamba", "attention"),
        benchmark("pope"),
        "within",
        0.05,
    ),
    Prediction(
        "Mamba is not behind attention on GQA.",
        "Mamba leads on GQA at all three sizes by 0.7 to 1.4 points (2409.05395).",
        families("mamba", "attention"),
        benchmark("gqa"),
        "above",
        -0.03,
    ),
    Prediction(
        "Mamba-2 finds signs as well as Mamba.",
        "Nothing published separates them at equal size; its larger state may help a little.",
        families("mamba2", "mamba"),
        _RETRIEVAL[SIGNS],
        "within",
        0.05,
    ),
    Prediction(
        "On average over language models the scan of vss_l2 buys nothing on GQA.",
        "VL-Mamba's own gains are within 1 point; an earlier ablation here saw none.",
        connectors("vss_l2", "mlp"),
        benchmark("gqa"),
        "within",
        0.05,
    ),
    Prediction(
        "Nor does it buy Mamba more than it buys attention in finding signs.",
        "All four read patches in one order; theory would let a recurrent one gain more.",
        lambda _, start: contrasts.interaction(("vss_l2", "mlp"), ("mamba", "attention"), start),
        _RETRIEVAL[SIGNS],
        "within",
        0.1,
    ),
    Prediction(
        "The question before the picture does not hurt Mamba in finding signs.",
        "It helps grounding a little (2409.05395): the state can keep what is asked for.",
        of_order("mamba", "question_first"),
        _RETRIEVAL[SIGNS],
        "above",
        -0.03,
    ),
    Prediction(
        "OCR tokens before the question help Mamba on TextVQA.",
        "Cobra: 58.2 before, 43.0 behind; there it was not trained with either.",
        of_order("mamba", "ocr_first"),
        benchmark("textvqa"),
        "above",
        0.0,
    ),
    Prediction(
        "Row separators do not matter to Mamba on GQA.",
        "A guess: 16 patches of a fixed grid can be counted by a recurrent model.",
        of_order("mamba", "row_separators"),
        benchmark("gqa"),
        "within",
        0.05,
    ),
    Prediction(
        "Attention needs more updates than Mamba until it uses its picture.",
        "A guess: small attention models need time to form heads that look things up.",
        families("attention", "mamba"),
        None,
        "above",
        0.0,
    ),
)


def verdict(kept: Records, prediction: Prediction) -> Verdict:
    """What the records say of a prediction, by the rule above."""
    start, contrast = contrasts.best_told(kept, prediction.contrast)
    if prediction.outcome is None:
        found = contrasts.begin_difference(kept, contrast)
        if found is None:
            return Verdict(NOT_RUN)
        value, draws, seeds = found
    else:
        told = contrasts.drawn(kept, contrast, prediction.outcome)
        if told is None:
            return Verdict(NOT_RUN)
        value, draws, seeds = told.mean, told.draws, told.seeds
    tail = ALPHA / len(PREDICTIONS) / 2
    low, high = (float(end) for end in np.quantile(draws, [tail, 1 - tail]))
    word = judged(prediction.claim, prediction.margin, low, high)
    return Verdict(word, value, low, high, seeds, start)


def judged(claim: str, margin: float, low: float, high: float) -> str:
    """The rule."""
    if low == high == 0:
        return UNDECIDED
    if claim == "above":
        return HELD if low > margin else FAILED if high < margin else UNDECIDED
    if -margin < low and high < margin:
        return HELD
    return FAILED if low > margin or high < -margin else UNDECIDED
