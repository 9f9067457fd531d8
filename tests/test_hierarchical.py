"""The hierarchical bootstrap against the same thing written with loops, and known spreads."""

from __future__ import annotations

import random
from statistics import fmean, stdev

import numpy as np
import pytest

from harness.scoring.hierarchical import DRAWS, hierarchical

NAN = float("nan")


def by_loops(values: list[list[float]], pictures: list[str], draws: int) -> list[float]:
    """Draws of the mean: seeds, pictures, questions of each; no correction for few seeds."""
    rng, found = random.Random(7), []
    members: dict[str, list[int]] = {}
    for place, picture in enumerate(pictures):
        members.setdefault(picture, []).append(place)
    names = list(members)
    for _ in range(draws):
        chosen = [
            rng.choice(members[name])
            for name in rng.choices(names, k=len(names))
            for _ in members[name]
        ]
        seeds = rng.choices(values, k=len(values))
        found.append(fmean(seed[place] for seed in seeds for place in chosen))
    return found


def test_the_draws_are_those_of_the_loops_but_for_the_seeds_correction():
    rng = random.Random(1)
    pictures = [f"p{n // 3}" for n in range(36)] + ["alone"]
    own = {picture: rng.random() for picture in pictures}
    values = [[float(rng.random() < own[p]) for p in pictures] for _ in range(12)]
    found = hierarchical(np.array(values), pictures)
    loops = by_loops(values, pictures, 3000)
    assert found.mean == pytest.approx(fmean(x for seed in values for x in seed))
    assert (found.seeds, found.pictures, found.questions) == (12, 13, 37)
    assert fmean(found.draws) == pytest.approx(fmean(loops), abs=0.01)
    assert stdev(found.draws) == pytest.approx(stdev(loops), rel=0.08)  # 12 seeds: 12 / 11
    low, high = found.interval()
    ordered = sorted(loops)
    assert low == pytest.approx(ordered[75], abs=0.03)
    assert high == pytest.approx(ordered[-76], abs=0.03)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_few_seeds_have_the_spread_that_their_own_estimate_says(seeds):
    """Without the correction it would be sqrt((S - 1) / S) of that: 0.71 of it for two seeds."""
    means = [0.1 * n**2 for n in range(seeds)]
    values = np.repeat(np.array(means)[:, None], 40, axis=1)
    found = hierarchical(values, [str(n) for n in range(40)])
    assert found.draws.std() == pytest.approx(stdev(means) / seeds**0.5, rel=0.05)


def test_questions_of_a_picture_are_drawn_together():
    alike = np.repeat(np.arange(20) % 2, 5)[None].astype(float)
    together = hierarchical(alike, [str(n // 5) for n in range(100)])
    apart = hierarchical(alike, [str(n) for n in range(100)])
    assert together.draws.std() == pytest.approx((0.25 / 20) ** 0.5, rel=0.08)
    assert apart.draws.std() == pytest.approx((0.25 / 100) ** 0.5, rel=0.08)


def test_a_question_that_one_seed_lacks_is_left_out_of_all():
    found = hierarchical(np.array([[1.0, NAN, 0.0], [1.0, 1.0, 1.0]]), ["a", "b", "c"])
    assert (found.mean, found.questions) == (0.75, 2)
    with pytest.raises(ValueError, match="no question has a value with every seed"):
        hierarchical(np.array([[NAN], [1.0]]), ["a"])


def test_p_values_are_small_where_there_is_a_difference_and_never_zero():
    pictures = [str(n) for n in range(200)]
    rng = np.random.default_rng(3)
    noise = rng.choice([-1.0, 0.0, 1.0], size=(3, 200))
    assert hierarchical(noise, pictures).p_value > 0.05
    assert hierarchical(noise + 0.6, pictures).p_value == 2 / (DRAWS + 1)
    assert hierarchical(np.zeros((3, 200)), pictures).p_value == 1.0
    same = hierarchical(noise, pictures)
    assert (same.draws == hierarchical(noise, pictures).draws).all()
