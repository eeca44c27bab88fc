"""Names that become folders are checked before they do."""

import pytest

from stages.errors import UserError
from stages.ids import check_id


@pytest.mark.parametrize("name", ["0bR6pUOhZo4", "-starts-with-a-dash", "_x", "a.b", "A" * 200])
def test_a_safe_name_is_returned_unchanged(name):
    assert check_id(name, kind="video id") == name


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\\b", "a b", "a\n", "ü", "a\0", "A" * 201, None, 3])
def test_an_unsafe_name_is_refused_in_one_line_that_says_what_is_allowed(name):
    with pytest.raises(UserError, match=r"train.json: video id cannot be used as a name; .*allowed: 1 to 200") as error:
        check_id(name, kind="video id", where="train.json")
    assert "\n" not in str(error.value)
