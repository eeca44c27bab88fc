"""The corpus of the extraction's tests, made once for all of them."""

from tests.faults.extract_corpus import corpus, source  # noqa: F401
