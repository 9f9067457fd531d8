"""The independent check of a run's scores: lmms-eval's own task, beside this harness's.

    differences, against = check(task, metrics, given, "lmms")

Under `lmms`, the task of that benchmark in the installed lmms-eval (its `process_results` and its
aggregation) gets the rows as they were loaded and the answers as they were given; nothing of
`tasks` is asked. Under `paper` no such code is installed: there lmms-eval's task counts what this
harness read out of each answer ("yes", "B"), which checks subsets, pairs, rotations and totals, but
not the reading. Where neither can be had, nothing is compared, and `against` says so.

lmms-eval takes seconds to load, so a trial run (--limit) under `paper` goes without (`skipped`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tasks.common import Benchmark

NOTHING = "nothing"
Row = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """A row as it was loaded, the answer as given, what was read in it, and the reference.

    with_image: whether the question came with an image. excluded: why the row was left out.
    """

    row: Row
    answer: str
    parsed: str | None
    reference: Any
    with_image: bool
    excluded: str | None = None


def _everything(_: Given) -> bool:
    return True


def _with_image(given: Given) -> bool:
    return given.with_image


def _unrotated(given: Given) -> bool:
    return int(given.row["index"]) < 1_000_000


@dataclass(frozen=True)
class Metric:
    """A metric of lmms-eval's task, on the rows that ours of that name is over.

    `only_lmms`: the protocols define it differently. `mean_of_categories`: under `paper` it is the
    mean of its values in each category.
    """

    name: str
    rows: Callable[[Given], bool] = _everything
    only_lmms: bool = False
    mean_of_categories: bool = False


@dataclass(frozen=True)
class Official:
    """A task file of lmms-eval, and its metrics under the names that they have here.

    `scale`: their values over ours. `prepare`: a row as the task wants it; adds only what it never
    scores by. `reading`: a text that it can only read as what was read here; None where its
    counting cannot be asked for alone.  `unread`: what it gets in place of an answer in which
    nothing was read here, where it would draw at random.  `digits`: to which it rounds its values.
    """

    file: str
    metrics: Mapping[str, Metric]
    scale: float = 1.0
    prepare: Callable[[Row], Row] = dict
    reading: Callable[[Given], str] | None = None
    unread: Callable[[Given], str] | None = None
    digits: int | None = None
    same_in_both: bool = False  # the protocols score alike


def _word(given: Given) -> str:
    return given.parsed or "other"


def _letter(given: Given) -> str:
    return given.parsed or ""


def _option(given: Given) -> str:
    """The letter; a wrong one for an answer that is no option, where lmms-eval would go on."""
    if given.parsed in tuple("ABCDE"):
        return str(given.parsed)
    return "B" if given.row["answer"] == "A" else "A"


def _no_choice(given: Given) -> str:
    """A wrong option for a question with options; the answer itself for an open one."""
    if given.row["question_type"] != "multiple-choice":
        return given.answer
    return "(B)" if given.row["answer"] == "A" else "(A)"


def _mmbench_row(row: Row) -> Row:
    described = dict.fromkeys(("hint", "source", "split", "category", "L2-category"), "")
    return {**described, **row, "index": int(row["index"])}  # a TSV's cells are text


EXACT_MATCH = {"accuracy": Metric("exact_match")}
MMBENCH = Official(
    "mmbench/mmbench_en_dev_static.yaml",
    {
        "accuracy": Metric("gpt_eval_score"),
        "vanilla_accuracy": Metric("gpt_eval_score", rows=_unrotated),
    },
    scale=100.0,
    prepare=_mmbench_row,
    reading=_option,
)
OFFICIAL = {
    "pope": Official(
        "pope/pope.yaml",
        {
            "f1": Metric("pope_f1_score", mean_of_categories=True),
            "accuracy": Metric("pope_accuracy"),
            "precision": Metric("pope_precision"),
            "recall": Metric("pope_recall"),
            "yes_ratio": Metric("pope_yes_ratio", only_lmms=True),
        },
        prepare=lambda row: {"question_id": "", **row},
        reading=_word,
    ),
    "mme": Official(
        "mme/mme.yaml",
        {
            "perception": Metric("mme_perception_score"),
            "cognition": Metric("mme_cognition_score"),
        },
        reading=_word,
    ),
    "scienceqa": Official(
        "scienceqa/scienceqa.yaml",
        {
            "accuracy": Metric("exact_match", rows=_with_image),
            "accuracy_all": Metric("exact_match"),
        },
        reading=_letter,
    ),
    "mmbench": MMBENCH,
    "mmbench_cn": MMBENCH,
    "vqav2": Official("vqav2/vqav2_val.yaml", EXACT_MATCH),
    "seedbench": Official(
        "seedbench/seedbench.yaml", {"accuracy": Metric("seed_image")}, reading=_option
    ),
    "mmmu": Official(
        "mmmu/mmmu_val.yaml", {"accuracy": Metric("mmmu_acc")}, unread=_no_choice, digits=5
    ),
    "vizwiz": Official("vizwiz_vqa/vizwiz_vqa_val.yaml", EXACT_MATCH),
    "textvqa": Official("textvqa/textvqa_val.yaml", EXACT_MATCH),
    "gqa": Official("gqa/gqa.yaml", EXACT_MATCH),
    "easy_vqa": Official("gqa/gqa.yaml", EXACT_MATCH),
    "coco_cap": Official(  # the headline alone: each metric starts two Java programs
        "coco_cap/coco2017_cap_val.yaml",
        {"CIDEr": Metric("coco_CIDEr")},
        prepare=lambda row: {"id": 0, **row},
        same_in_both=True,
    ),
}


def skipped(task: Benchmark, protocol: str, limit: int | None) -> str:
    """Why no check is made at all; empty where one is."""
    official = OFFICIAL.get(task.name)
    if official is None:
        return "lmms-eval's own task needs a judge"
    if protocol == "lmms" or official.same_in_both:
        return ""
    if official.reading is None:
        return "lmms-eval has no rules of this protocol"
    return "a trial run" if limit else ""


def check(
    task: Benchmark, metrics: Mapping[str, float], given: Sequence[Given], protocol: str
) -> tuple[list[str], str]:
    """Differences from lmms-eval's own task, in words, and the name of what was compared with.

    given: every row whose image could be read. A row without truth is not lmms-eval's to score;
    one that was left out for another reason is, unless lmms-eval cannot.
    """
    official = OFFICIAL.get(task.name)
    if official is None:
        return [], NOTHING
    reads = protocol == "lmms" or official.same_in_both
    known = [one for one in given if one.reference is not None]
    if not known or (not reads and official.reading is None):
        return [], NOTHING
    name = Path(official.file).stem
    what = "process_results and aggregation" if reads else "aggregation, of what was read here"
    scored = [one for one in known if one.excluded is None]
    trouble = ""
    for rows, which in ((known, ""), (scored, " (rows scored here)")):
        try:
            expected = _values(official, rows, protocol, reads)
        # Foreign code, on rows that it may not be made for: whatever it raises is its answer.
        except Exception as error:
            trouble = f"; lmms-eval's own {name} cannot take these rows: {error!r}"[:200]
        else:
            return _differences(
                expected, metrics, name, official.digits
            ), f"lmms-eval's own {name}: {what}{which}"
    return [], NOTHING + trouble


def _values(
    official: Official, given: Sequence[Given], protocol: str, reads: bool
) -> dict[str, float]:
    """The name of each metric here -> lmms-eval's value."""
    rows = [official.prepare(one.row) for one in given]
    with _silence():
        from harness.models.lmms import OwnTask  # loads lmms-eval, which takes seconds

        task = OwnTask(official.file, rows)
        results: list[tuple[Given, Mapping[str, Any]]] = []
        for one, row in zip(given, rows, strict=True):
            answer = one.answer if reads or not official.reading else official.reading(one)
            if official.unread and one.parsed is None:
                answer = official.unread(one)
            results.append((one, task.results(row, answer)))
        values = {}
        for name, metric in official.metrics.items():
            if protocol == "lmms" or not metric.only_lmms:
                pooled = protocol == "lmms" or not metric.mean_of_categories
                parts: dict[str, list[Mapping[str, Any]]] = {}
                for one, result in results:
                    if metric.rows(one):
                        part = "" if pooled else one.row["category"]
                        parts.setdefault(part, []).append(result)
                found = [task.value(metric.name, part) for part in parts.values()]
                values[name] = fmean(found) / official.scale if found else math.nan
    return values


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Neither lmms-eval's prints nor those of the programs that it starts."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _differences(
    expected: Mapping[str, float], found: Mapping[str, float], name: str, digits: int | None
) -> list[str]:
    tolerance = 1e-9 if digits is None else 0.51 * 10**-digits
    return [
        f"{metric}: {found.get(metric, math.nan)} here, {value} by lmms-eval's own {name}"
        for metric, value in expected.items()
        if math.isfinite(value) != (metric in found)
        or (metric in found and not math.isclose(value, found[metric], abs_tol=tolerance))
    ]
