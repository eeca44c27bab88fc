"""What the walks over containers share: a file's bytes, what was read of it, and where it breaks."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """Where a structure breaks.

    Attributes:
        at: byte from which on nothing is proved: the beginning of the last element before the break, which may be
            damaged itself.
        why: what broke.
    """

    at: int
    why: str


@dataclass(frozen=True)
class ReadPackets:
    """What FFmpeg read of the video stream (`K` packets).

    Attributes:
        stream: the stream's number in the file.
        ident: the stream's identifier in the container (a program's PID in MPEG-TS).
        frames: how many the header states, 0 where it does not.
        positions: [K] where each begins in the file, -1 where FFmpeg does not know.
        sizes: [K] bytes of each.
        ticks: [K] presentation timestamps, None where the file leaves one out.
    """

    stream: int
    ident: int
    frames: int
    positions: list[int]
    sizes: list[int]
    ticks: list[int | None]


class FileBytes:
    """A file's bytes by offset; short at its end, as a slice would be."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.size = os.fstat(file).st_size

    def __call__(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on, less at the file's end."""
        return os.pread(self._file, max(0, min(count, self.size - at)), at)
