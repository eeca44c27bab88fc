"""How long video files are, by their headers, read in a decode child."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from stages.decode import DecodeChild, DecodeError, LengthRequest

DEADLINE_S = 20.0
"""How long one file may take; a header is a few kilobytes, but a network disk may sleep."""


def read_lengths(files: Mapping[str, Path], *, deadline_s: float = DEADLINE_S) -> Iterator[tuple[str, float | str]]:
    """Yield, for each named file in turn, its length in seconds, or why it is not known.

    A file that hangs or crashes the child costs its deadline and one reason; the next one gets a new child.
    """
    with DecodeChild() as child:
        for name, path in files.items():
            try:
                yield name, child.length(LengthRequest(path, by_header=True), deadline_s).seconds
            except DecodeError as error:
                yield name, error.reason
