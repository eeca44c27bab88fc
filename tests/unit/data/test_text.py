"""Text is cleaned as the BLIP processors do it."""

import pytest

from stages.data.text import TEXT_PROCESSORS, clean_caption, clean_question


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("What is the way_speaking of the movie?", "what is the way_speaking of the movie?"),
        ("Ex-Boyfriend  Ex-Girlfriend", "ex-boyfriend ex-girlfriend"),
        (' A "b" (c): d; ~e#f*g! ', "a b c d e f g"),
        ("end.\n", "end"),
        ("3.5", "3 5"),
    ],
)
def test_a_caption_is_lower_case_with_spaces_for_punctuation(text, cleaned):
    assert clean_caption(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("What is 3.5?", "what is 35?"), ("a, b-c's  d! ", "a, b-c's  d"), ("xbox360", "xbox360")],
)
def test_a_question_loses_its_punctuation_and_keeps_its_spaces(text, cleaned):
    assert clean_question(text) == cleaned


@pytest.mark.parametrize("clean", [clean_caption, clean_question])
def test_only_fifty_words_are_kept(clean):
    assert clean(" ".join(["word"] * 51)) == " ".join(["word"] * 50)


def test_verbatim_changes_nothing():
    assert TEXT_PROCESSORS["verbatim"](" A.b ") == " A.b "
