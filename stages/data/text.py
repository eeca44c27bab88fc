"""How prompts, questions and answers are cleaned before a tokenizer sees them (the BLIP processors' rules).

And what a question asks for, by its first word.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

MAX_WORDS = 50
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
_ANSWER_TYPES = ("what", "who", "how", "when", "where")


def clean_caption(text: str) -> str:
    """Lower-case, turn `.!"()*#:;~` into spaces, collapse and strip spaces, keep 50 words (LAVIS `blip_caption`)."""
    spaced = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def clean_question(text: str) -> str:
    """Lower-case, delete `.!"()*#:;~`, strip trailing spaces, keep 50 words (LAVIS `blip_question`)."""
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "))


def answer_type_by_word(question: str) -> str | None:
    """Return what MSVD-QA calls the answer type, which is always the question's first word; None for another word."""
    first = next(iter(question.lower().split(maxsplit=1)), "")
    return first if first in _ANSWER_TYPES else None


def _first_words(text: str) -> str:
    words = text.split(" ")
    return text if len(words) <= MAX_WORDS else " ".join(words[:MAX_WORDS])


TEXT_PROCESSORS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"caption": clean_caption, "question": clean_question, "verbatim": str}
)
"""By the name that a card's `text` key uses."""
