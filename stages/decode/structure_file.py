"""What the walks over containers share: a file's bytes, what was read of it, and where it breaks."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple


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


class Packet(NamedTuple):
    """A packet as FFmpeg read it; `place` is where it begins in the file, -1 where FFmpeg does not know."""

    ticks: int | None
    duration_ticks: int | None
    is_key: bool
    is_shown: bool
    is_corrupt: bool
    place: int
    size: int

    @classmethod
    def of(cls, packet: Any) -> "Packet":
        return cls(
            ticks=packet.pts,
            duration_ticks=packet.duration,
            is_key=packet.is_keyframe,
            is_shown=not packet.is_discard,
            is_corrupt=packet.is_corrupt,
            place=-1 if packet.pos is None else packet.pos,
            size=packet.size,
        )


class FileBytes:
    """A file's bytes by offset; short at its end, as a slice would be."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.size = os.fstat(file).st_size

    def __call__(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on, less at the file's end."""
        return os.pread(self._file, max(0, min(count, self.size - at)), at)
