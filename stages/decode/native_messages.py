"""What a native library prints to standard error, for libraries that tell of damage in no other way."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SHOWN_CHARS = 200


@contextmanager
def native_messages() -> Iterator[Callable[[], str]]:
    """Keep what is printed while the block runs, by this whole process; yields a function that returns its beginning.

    Not for several threads at once.
    """
    usual = os.dup(2)
    with tempfile.TemporaryFile() as said:

        def beginning() -> str:
            text = os.pread(said.fileno(), _SHOWN_CHARS, 0).decode("utf-8", "replace")
            return " ".join(text.split())

        os.dup2(said.fileno(), 2)
        try:
            yield beginning
        finally:
            os.dup2(usual, 2)
            os.close(usual)
