"""The score of a model that looks at nothing, and how sure an accuracy is."""

import pytest

from stages.metrics import majority_floor, wilson_interval


def test_the_floor_is_the_share_of_the_most_frequent_answer():
    assert majority_floor(["a", "b", "a", "c"]) == 0.5


def test_the_floor_of_no_answers_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        majority_floor([])


@pytest.mark.parametrize(
    ("correct", "total", "percent"),
    [
        (63, 91, (59.1, 77.8)),  # Diff-LMM on relationship (FACTS A.6)
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
