"""Intervals: known values, the range, clustering, too few clusters or seeds, coverage."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

import tasks
from harness.scoring import intervals
from harness.scoring.intervals import Interval, NoInterval, groups_for, share_interval, wilson
from tasks.coco_cap import task as coco_cap
from tasks.common import PROTOCOLS, Case, Report
from tasks.mme import scorer as mme_scorer
from tasks.mme import task as mme
from tasks.pope import task as pope
from tasks.textvqa import task as textvqa

TOOL = Path(__file__).parents[1] / "tools" / "coverage.py"
_spec = importlib.util.spec_from_file_location("simulated_coverage", TOOL)
coverage = sys.modules["simulated_coverage"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson(successes / n, n) == pytest.approx((low, high), abs=1e-4)


def accuracy_interval(right: np.ndarray, questions: int) -> Interval | NoInterval:
    """Of TextVQA answers, `right` per row, `questions` rows an image."""
    docs = [
        {"question": f"{row}?", "answers": ["yes"] * 10, "image_id": str(row // questions)}
        for row in range(len(right))
    ]
    report = textvqa.evaluate(docs, ["yes" if hit else "no" for hit in right], "paper")
    return intervals.intervals(textvqa, docs, report, "paper")["accuracy"]


def test_independent_answers_get_scipys_wilson_interval():
    right = np.random.default_rng(1).random(400) < 0.7
    found = accuracy_interval(right, 1)
    theirs = scipy_stats.binomtest(int(right.sum()), 400).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
    assert found.method == "Wilson, effective n 399, 400 clusters"


def test_questions_of_one_image_count_as_one():
    image_right = np.random.default_rng(2).random(60) < 0.5
    found = accuracy_interval(np.repeat(image_right, 9), 9)  # all right or all wrong of an image
    theirs = scipy_stats.binomtest(int(image_right.sum()), 60).proportion_ci(method="wilson")
    assert 0.8 < (found.high - found.low) / (theirs.high - theirs.low) < 1.0  # drawn towards 0.2


def test_the_variance_is_the_linearised_one_of_clusters():
    """Against the textbook's formula for a ratio of cluster totals (Cochran, 1977, 6.3)."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 9, 300)
    clusters = [str(c) for c, size in enumerate(sizes) for _ in range(size)]
    chance = np.repeat(generator.beta(4, 1, 300), sizes)
    right = generator.random(len(chance)) < chance
    sums = np.bincount(np.repeat(np.arange(300), sizes), right)
    linear = np.square(sums - right.mean() * sizes).sum() * 300 / 299 / sizes.sum() ** 2

    def metrics_of(rows):
        return {"mean": float(right[rows].mean())}

    groups = intervals._members(clusters)
    parts = intervals.Parts(len(clusters), metrics_of)
    found = intervals.jackknife(parts, groups, {"mean": float(right.mean())})
    assert found["mean"] == pytest.approx(linear, rel=0.02)


def pope_doc(image: int, answer: str = "yes", category: str = "random") -> dict:
    question = f"Is there a dog in image {image}?"
    return {
        "question": question,
        "answer": answer,
        "category": category,
        "image_source": str(image),
    }


@pytest.mark.parametrize(("answer", "value"), [("yes", 1.0), ("no", 0.0)])
def test_none_and_all_get_an_interval_inside_the_range(answer, value):
    docs = [pope_doc(i) for i in range(20)]
    report = pope.evaluate(docs, [answer] * 20, "paper")
    found = intervals.intervals(pope, docs, report, "paper")
    bound = 1.959964**2 / (20 + 1.959964**2)  # Wilson's of 0 of 20
    for name in ("accuracy", "f1", "recall"):
        low, high = found[name].low, found[name].high
        assert (low, high) == pytest.approx((0, bound) if value == 0 else (1 - bound, 1)), name


def mme_answers(right: list[tuple[bool, bool]], subtask: str = "existence") -> tuple:
    docs = [
        {"question_id": f"{image}.png", "question": "?", "answer": "Yes", "category": subtask}
        for image, _ in enumerate(right)
        for _ in range(2)
    ]
    return docs, ["Yes" if hit else "No" for pair in right for hit in pair]


def test_points_end_at_the_points_there_are():
    docs, answers = mme_answers([(True, True)] * 12)
    more, theirs = mme_answers([(True, True)] * 9 + [(True, False)] * 3, "count")
    docs, answers = docs + more, answers + theirs
    report = mme.evaluate(docs, answers, "paper")
    found = intervals.intervals(mme, docs, report, "paper")
    assert report.metrics["perception"] == pytest.approx(200 + 87.5 + 75)
    assert 250 < found["perception"].low < 362.5 < found["perception"].high < 400
    assert found["existence/score"].high == 200
    assert found["existence/score"].low == pytest.approx(200 * 12 / (12 + 1.959964**2))
    assert mme.maximum("perception", report.metrics) == 400
    assert mme.maximum("cognition", ()) == 200 * len(mme_scorer.SUBTASKS["cognition"])


def test_pairs_count_as_images_and_students_t_as_their_variance_is_estimated():
    docs, answers = mme_answers([(True, i % 3 > 0) for i in range(24)])
    found = intervals.intervals(mme, docs, mme.evaluate(docs, answers, "paper"), "paper")
    scores = np.array([1.0 if i % 3 > 0 else 0.25 for i in range(24)])  # of 200 points
    variance = scores.var(ddof=1) / 24
    trials = scores.mean() * (1 - scores.mean()) / variance
    low, high = wilson(scores.mean(), trials, scipy_stats.t.ppf(0.975, 23))
    got = found["existence/score"]
    assert (got.low / 200, got.high / 200) == pytest.approx((low, high), rel=1e-6)


def captions(scores: list[float]) -> tuple[list[dict], Report]:
    """Captions with the given CIDEr of their own."""
    docs = [{"question_id": f"{i}.jpg", "answer": ["a dog"]} for i, _ in enumerate(scores)]
    cases = [Case(None, "a dog", {"cider": score}) for score in scores]
    return docs, Report(coco_cap.aggregate(docs, cases, "paper"), cases, len(docs), 0)


def test_cider_is_never_below_nothing():
    docs, report = captions([4.0] + [0.01] * 14)
    found = intervals.intervals(coco_cap, docs, report, "paper")["CIDEr"]
    assert 0 < found.low < report.metrics["CIDEr"] < found.high < 10
    docs, report = captions([0.0] * 15)
    found = intervals.intervals(coco_cap, docs, report, "paper")["CIDEr"]
    assert (found.low, found.high) == pytest.approx((0, 10 * 1.959964**2 / (15 + 1.959964**2)))


@pytest.mark.parametrize(("images", "reason"), [(4, "too few: 4 clusters"), (9, "too few: 9 clus")])
def test_few_images_are_said_to_be_too_few(images, reason):
    docs = [pope_doc(i % images) for i in range(36)]
    report = pope.evaluate(docs, ["yes"] * 30 + ["no"] * 6, "paper")
    for found in intervals.intervals(pope, docs, report, "paper").values():
        assert isinstance(found, NoInterval) and found.reason.startswith(reason)


def test_a_category_of_few_images_has_none_of_its_own_only():
    docs = [pope_doc(i, category="random" if i < 30 else "popular") for i in range(34)]
    report = pope.evaluate(docs, ["yes", "no"] * 17, "lmms")
    found = intervals.intervals(pope, docs, report, "lmms")
    assert found["popular/accuracy"] == NoInterval("too few: 4 clusters")
    assert isinstance(found["random/accuracy"], Interval)
    assert isinstance(found["accuracy"], Interval)


def test_excluded_rows_have_no_say():
    docs = [pope_doc(i) for i in range(12)]
    cases = [Case(1.0, "yes")] * 6 + [None] * 6
    report = Report(metrics={"accuracy": 1.0}, cases=cases, n=6, n_unparsed=0)
    found = intervals.intervals(pope, docs, report, "paper")
    assert found == {"accuracy": NoInterval("too few: 6 clusters")}


def rows_of(task, count: int, seed: int) -> list[tuple[dict, Case]]:
    """Documents and scored answers of a benchmark, of all the kinds that it tells apart."""
    generator = np.random.default_rng(seed)
    columns = {
        "pope": {"category": ["random", "popular", "adversarial"], "answer": ["yes", "no"]},
        "vqav2": {"answer_type": ["yes/no", "number", "other", "unheard of"]},
        "vizwiz": {"category": ["other", "unanswerable", "", None]},
        "seedbench": {"question_type_id": [1, 5, 9, 77]},
        "mmmu": {"id": ["validation_Art_1", "validation_Math_2", "validation_Unknown_3"]},
    }
    scores = (0.0, 1.0) if task.name in ("pope", "seedbench", "mmmu") else (0.0, 0.3, 0.6, 1.0)
    parsed = ["yes", "no", None]
    found = []
    for _ in range(count):
        doc = {c: v[generator.integers(len(v))] for c, v in columns.get(task.name, {}).items()}
        said = parsed[generator.integers(3)]
        found.append((doc, Case(scores[generator.integers(len(scores))], said)))
    return found


COUNTED = ("pope", "vqav2", "vizwiz", "seedbench", "mmmu", "textvqa", "gqa", "easy_vqa")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", COUNTED)
def test_counts_of_kinds_give_what_the_rows_themselves_give(name, protocol):
    """With each group of rows left out, and of single rows: beside `aggregate` of those rows."""
    task = tasks.load(name)
    rows = rows_of(task, 120, seed=len(name))
    counted = intervals.Parts.of(task, rows, protocol)
    assert isinstance(counted, intervals.Counted)
    by_rows = intervals.Parts(
        len(rows),
        lambda picked: task.aggregate(
            [rows[i][0] for i in picked], [rows[i][1] for i in picked], protocol
        ),
    )
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    groups = [order[i : i + 7] for i in range(0, len(order), 7)]
    for some in (groups, [order]):  # the last: nothing is left
        pairs = zip(counted.without(some), by_rows.without(some), strict=True)
        assert all(one == pytest.approx(other, abs=1e-12) for one, other in pairs)
    for row in range(len(rows)):
        assert counted.metrics([row]) == pytest.approx(by_rows.metrics([row]))
    assert counted.metrics(order) == pytest.approx(by_rows.metrics(order))


def test_metrics_of_pairs_and_of_whole_sets_are_made_of_rows():
    rows = [(pope_doc(0) | {"question_id": "1"}, Case(1.0, "yes"))]
    for task in (mme, coco_cap):
        assert type(intervals.Parts.of(task, rows, "paper")) is intervals.Parts


def test_many_clusters_are_left_out_in_groups_with_the_same_result():
    right = np.random.default_rng(5).random(3000) < 0.8
    values = {"mean": float(right.mean())}

    def metrics_of(rows):
        return {"mean": float(right[rows].mean())}

    singles = intervals._members(range(3000))
    merged = intervals._merged(singles, 500, np.random.default_rng(0))
    assert len(merged) == 500
    assert sorted(row for group in merged for row in group) == list(range(3000))
    parts = intervals.Parts(3000, metrics_of)
    exact, rough = (intervals.jackknife(parts, g, values)["mean"] for g in (singles, merged))
    assert rough == pytest.approx(exact, rel=0.25)
    assert groups_for(10) == intervals.MAX_GROUPS
    assert groups_for(214_354) == intervals.MIN_GROUPS


def test_seeds_stay_inside_the_range_and_few_are_said_to_be_too_few():
    assert intervals.seeds_interval([18.7, 99.0, 85.0], 100) == NoInterval("too few: 3 seeds")
    values = [20.0, 98.0, 99.0, 99.5, 99.9]
    found = intervals.seeds_interval(values, 100)
    plain = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert plain.high > 100
    assert 0 < found.low < np.mean(values) < found.high < 100
    close = intervals.seeds_interval([50.0, 50.1, 49.9, 50.2, 49.8], 100)
    plain = scipy_stats.ttest_1samp([50.0, 50.1, 49.9, 50.2, 49.8], 0).confidence_interval(0.95)
    assert (close.low, close.high) == pytest.approx((plain.low, plain.high), abs=0.01)
    assert intervals.seeds_interval([7.0] * 6, 100) == NoInterval("all seeds alike")


CELLS = [
    coverage.Cell("accuracy", 0.95, 0.2, 10, 2),
    coverage.Cell("accuracy", 0.90, 0.1, 72, 6),
    coverage.Cell("f1", 0.95, 0.1, 20, 6),
    coverage.Cell("mme", 0.90, 0.2, 10, 2),
    coverage.Cell("cider", 0.08, 0.2, 10, 1, aim=coverage.CIDER_AIM),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.metric)
def test_coverage_is_near_95_per_cent(cell):
    found, bootstrap = coverage.coverage(cell, 4000, seed=0)
    assert cell.aim[0] <= found <= cell.aim[1]
    assert bootstrap < 0.95  # the percentile interval is too narrow in every cell


def test_the_simulation_asks_for_the_interval_that_a_file_gets():
    cell = coverage.Cell("f1", 0.9, 0.2, 20, 6)
    right = coverage.answers(cell, 1, np.random.default_rng(7))[0]
    docs = [pope_doc(i, "yes" if q < 3 else "no") for i in range(20) for q in range(6)]
    said = [
        truth if hit else {"yes": "no", "no": "yes"}[truth]
        for truth, hit in zip([d["answer"] for d in docs], right.ravel(), strict=True)
    ]
    got = intervals.intervals(pope, docs, pope.evaluate(docs, said, "paper"), "paper")["f1"]
    sums, _ = coverage.f1(cell, 1, np.random.default_rng(7))
    low, high, _ = share_interval(*coverage.variances(sums), cell.sampled)
    assert (got.low, got.high) == pytest.approx((low[0], high[0]), rel=1e-4)
