"""Intervals: known values, clustering, seeds."""

from __future__ import annotations

import numpy as np
import pytest

from harness import stats
from harness.stats import cluster_bootstrap, draws_for, wilson
from tasks.common import Case, Report
from tasks.pope import task as pope


def mean_of(values):
    return lambda rows: {"mean": float(np.mean([values[row] for row in rows]))}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_of_independent_answers_is_the_normal_interval():
    values = np.random.default_rng(1).random(400) < 0.7
    low, high = cluster_bootstrap(mean_of(values), [str(i) for i in range(400)], 1000, 0)["mean"]
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.012)


def test_questions_of_one_image_count_as_one():
    image_right = np.random.default_rng(2).random(60) < 0.5
    values = np.repeat(image_right, 9)  # nine questions an image, all right or all wrong
    clusters = [str(i // 9) for i in range(540)]
    low, high = cluster_bootstrap(mean_of(values), clusters, 500, 0)["mean"]
    naive = cluster_bootstrap(mean_of(values), [str(i) for i in range(540)], 500, 0)["mean"]
    assert high - low > 2.5 * (naive[1] - naive[0])


def test_same_seed_same_interval():
    values = [0, 1, 1, 0, 1, 0, 1, 1]
    clusters = list("aabbccdd")
    first = cluster_bootstrap(mean_of(values), clusters, 100, 7)
    assert first == cluster_bootstrap(mean_of(values), clusters, 100, 7)
    assert first != cluster_bootstrap(mean_of(values), clusters, 100, 8)


def test_a_draw_that_loses_a_category_is_drawn_again():
    def total(rows):
        return {"total": float(len({row // 10 for row in rows}))} | {
            f"part{part}": 1.0 for part in {row // 10 for row in rows}
        }

    intervals = cluster_bootstrap(total, [str(i) for i in range(30)], 200, 0)
    assert intervals["total"] == (3.0, 3.0)


def test_no_interval_when_most_draws_lose_a_category():
    def parts(rows):
        return {f"part{row}": 1.0 for row in rows}  # every row a category of its own

    assert cluster_bootstrap(parts, [str(i) for i in range(20)], 50, 0) == {}


def test_draws_shrink_with_the_benchmark():
    assert draws_for(10) == stats.MAX_DRAWS
    assert draws_for(214_354) == stats.MIN_DRAWS


def pope_doc(image: int) -> dict:
    question = f"Is there a dog in image {image}?"
    return {"question": question, "answer": "yes", "category": "random", "image_source": str(image)}


def test_all_right_gets_wilson_for_accuracy_and_nothing_for_ratios():
    docs = [pope_doc(i) for i in range(20)]
    report = pope.evaluate(docs, ["yes"] * 20, "paper")
    intervals = stats.intervals(pope, docs, report, "paper")
    assert intervals["accuracy"].method == "wilson"
    assert (intervals["accuracy"].low, intervals["accuracy"].high) == wilson(20, 20)
    assert "recall" not in intervals


def test_excluded_rows_and_single_clusters_have_no_say():
    docs = [pope_doc(0), pope_doc(0)]
    report = Report(metrics={"accuracy": 1.0}, cases=[Case(1.0, "yes"), None], n=1, n_unparsed=0)
    assert stats.intervals(pope, docs, report, "paper") == {}
