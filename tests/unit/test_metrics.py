"""The score of a model that looks at nothing."""

import pytest

from stages.metrics import majority_floor


def test_the_floor_is_the_share_of_the_most_frequent_answer():
    assert majority_floor(["a", "b", "a", "c"]) == 0.5


def test_the_floor_of_no_answers_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        majority_floor([])
