"""The score of a model that looks at nothing, how sure an accuracy is, and whether two of them differ."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from stages.evaluate import metrics
from stages.evaluate.metrics import (
    bootstrap_interval,
    constant_accuracy,
    majority_answer,
    majority_floor,
    mcnemar_p,
    wilson_interval,
)


def test_of_equally_frequent_answers_the_first_is_the_majority():
    assert majority_answer(["b", "a", "a", "b", "c"]) == "b"


def test_a_constant_answer_is_right_where_it_occurs():
    assert constant_accuracy(["a", "b", "a", "c"], "b") == 0.25
    assert constant_accuracy(["a", "b"], "absent") == 0.0


def test_the_floor_is_the_share_of_the_most_frequent_answer():
    assert majority_floor(["a", "b", "a", "c"]) == 0.5


def test_the_floor_of_no_answers_is_an_error():
    for undefined in (majority_floor, majority_answer, lambda none: constant_accuracy(none, "a")):
        with pytest.raises(ValueError, match="no answers"):
            undefined([])


@pytest.mark.parametrize(
    ("correct", "total", "percent"),
    [
        (63, 91, (59.1, 77.8)),  # Diff-LMM on relationship (docs/paper-numbers.md)
        (53, 91, (48.0, 67.8)),  # MA-LMM on relationship
        # By hand, with z2 = 3.841459 and d = 1 + z2 / n: (p + z2 / 2n) / d -+ z sqrt(pq / n + z2 / 4n2) / d
        (1, 2, (9.5, 90.5)),
        (9, 10, (59.6, 98.2)),
    ],
)
def test_the_interval_is_wilsons(correct, total, percent):
    assert [round(100 * end, 1) for end in wilson_interval(correct, total)] == list(percent)


def test_all_wrong_begins_at_zero_and_all_right_ends_at_one():
    # The other end is n / (n + z2) from the far side: 3.841459 / 13.841459.
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775328)
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(1 - 0.2775328)
    assert high == 1.0


def test_more_samples_make_the_interval_narrower():
    widths = [high - low for low, high in (wilson_interval(7 * n, 10 * n) for n in (1, 10, 100))]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < widths[0] / 8


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2), (1, -2)])
def test_what_is_no_proportion_is_an_error(correct, total):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, total)


# --- bootstrap over groups


def every_draw(sums, sizes):
    """The bootstrap's distribution without chance: the share of each of the V ** V draws, sorted."""
    groups = range(len(sizes))
    draws = itertools.product(groups, repeat=len(sizes))
    return sorted(sum(sums[i] for i in drawn) / sum(sizes[i] for i in drawn) for drawn in draws)


@pytest.mark.parametrize(
    ("sums", "sizes"),
    [
        ([1, 1, 0, 3], [2, 3, 1, 4]),
        ([5, 0, 2, 2], [5, 5, 2, 9]),
        ([-1, 2, 0, 1, -2], [2, 3, 1, 4, 3]),  # differences of two models
    ],
)
def test_the_interval_over_groups_is_that_of_all_draws(sums, sizes):
    shares = every_draw(sums, sizes)
    found = bootstrap_interval(sums, sizes, resamples=20_000, seed=1)
    # The ends are shares of some draw; chance may move them past neighbours that lie within half a percent of draws.
    for end, quantile in zip(found, (0.025, 0.975), strict=True):
        ranks = [round((quantile + moved) * (len(shares) - 1)) for moved in (-0.005, 0.005)]
        assert shares[max(ranks[0], 0)] <= end <= shares[min(ranks[1], len(shares) - 1)]


def test_two_groups_span_from_the_worse_to_the_better():
    # One draw in four takes the first twice, one in four the second twice.
    assert bootstrap_interval([2, 1], [2, 4], resamples=1000, seed=0) == (0.25, 1.0)


def test_whole_groups_are_drawn_so_that_equal_samples_within_them_widen_the_interval():
    single = bootstrap_interval([1] * 60 + [0] * 40, [1] * 100, resamples=4000, seed=0)
    fours = bootstrap_interval([4] * 15 + [0] * 10, [4] * 25, resamples=4000, seed=0)
    assert single == pytest.approx(wilson_interval(60, 100), abs=0.02)
    # A quarter as many independent things: twice as wide.
    assert (fours[1] - fours[0]) / (single[1] - single[0]) == pytest.approx(2.0, abs=0.1)


def test_one_group_or_none_has_no_interval():
    assert bootstrap_interval([3], [4], resamples=100, seed=0) is None
    assert bootstrap_interval([], [], resamples=100, seed=0) is None


def test_groups_that_are_all_right_have_an_interval_without_width():
    assert bootstrap_interval([3, 2], [3, 2], resamples=100, seed=0) == (1.0, 1.0)


def test_the_seed_alone_decides_and_not_how_many_draws_are_held_at_once(monkeypatch):
    random = np.random.default_rng(5)
    sizes = random.integers(1, 9, 50).tolist()
    sums = [int(random.integers(0, size + 1)) for size in sizes]
    whole = bootstrap_interval(sums, sizes, resamples=999, seed=3)
    monkeypatch.setattr(metrics, "_MOST_DRAWS", 50 * 7)
    assert bootstrap_interval(sums, sizes, resamples=999, seed=3) == whole
    assert bootstrap_interval(sums, sizes, resamples=999, seed=4) != whole


# --- McNemar


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, Fraction(1)),
        (1, 0, Fraction(1)),  # 2 * (1 / 2)
        (0, 5, Fraction(1, 16)),  # 2 * (1 / 32)
        (1, 5, Fraction(7, 32)),  # 2 * (1 + 6) / 64
        (2, 8, Fraction(7, 64)),  # 2 * (1 + 10 + 45) / 1024
        (3, 3, Fraction(1)),  # twice the lower half is more than 1
    ],
)
def test_mcnemar_by_hand_whichever_is_first(first, second, p):
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == float(p)


def test_mcnemar_of_many_differences_is_near_its_normal_approximation():
    # z = (|450 - 550| - 1) / sqrt(1000) = 3.1307, two-sided p 0.001744.
    assert mcnemar_p(450, 550) == pytest.approx(0.001744, abs=2e-5)
    assert 0 < mcnemar_p(4000, 5000) < 1e-20


def test_negative_counts_are_an_error():
    with pytest.raises(ValueError, match="no counts"):
        mcnemar_p(-1, 2)
