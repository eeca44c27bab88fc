"""The structure of MPEG transport streams: sync bytes, continuity counters, and the times of pictures that begin."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stages.decode.structure_file import Break, FileBytes, Packet

_SYNC = 0x47
_STRIDES = (188, 192, 204)
_SYNCS_NEEDED = 5
_SEARCHED_BYTES = 2048
_PACKETS_AT_ONCE = 8192
_TIMES = 1 << 33

# A counter that jumps where one file was appended to another loses nothing: the next picture follows in time.
_FOLLOWS = 1.5


def mpegts_break(read: FileBytes, stream: Any, packets: Sequence[Packet]) -> Break | None:
    """Follow the video's packets; every picture that the stream begins must be among those that were read."""
    known = {one.ticks % _TIMES for one in packets if one.ticks is not None}
    begun = begun_before = 0  # where the last pictures begin
    times: list[int] = []
    for at, data, is_jump in _landmarks(read, stream.id):
        if data is None or data[1] & 0x80:
            return Break(begun, f"no whole packet begins at byte {at}")
        if not data[1] & 0x40:
            return Break(begun, f"packets are missing before byte {at}")
        content = data[5 + data[4] :] if data[3] & 0x20 else data[4:]
        if content[:3] != b"\0\0\1":
            return Break(begun, f"no picture begins at byte {at}")
        begun_before, begun = begun, at
        if content[7] & 0x80:
            shown, decoded = _times(content)
            if known and shown not in known:
                return Break(begun_before, f"the picture that begins at byte {at} was not found")
            times.append(decoded)
        if is_jump and not _follows(times):
            return Break(begun_before, f"packets are missing before byte {at}")
    return None


def _landmarks(read: FileBytes, ident: int) -> Iterator[tuple[int, bytes | None, bool]]:
    """The packets of one identifier at which a picture begins, the counter jumps, or an error is marked.

    Yields place, the packet's 188 bytes (None where there is no sync byte; then it ends), whether the counter jumps.
    """
    stride, start = _stride(read)
    counter = -1
    while start + stride <= read.size:
        block = np.frombuffer(read(start, stride * _PACKETS_AT_ONCE), dtype=np.uint8)
        rows = block[: len(block) // stride * stride].reshape(-1, stride)[:, :188]
        lost = np.flatnonzero(rows[:, 0] != _SYNC)
        whole = rows[: lost[0]] if len(lost) else rows
        ours = np.flatnonzero(((whole[:, 1] & 0x1F).astype(np.int32) << 8 | whole[:, 2]) == ident)
        if len(ours):
            flags, control = whole[ours, 1], whole[ours, 3]
            counters = np.append(counter if counter >= 0 else control[0] - (control[0] >> 4 & 1) & 15, control & 15)
            is_marked = (control & 0x20 != 0) & (whole[ours, 4] > 0) & (whole[ours, 5] & 0x80 != 0)
            is_jump = (np.diff(counters.astype(np.int16)) - (control >> 4 & 1)) & 15 != 0
            is_jump &= ~is_marked
            for index in np.flatnonzero(is_jump | (flags & 0xC0 != 0)):
                yield start + int(ours[index]) * stride, whole[ours[index]].tobytes(), bool(is_jump[index])
            counter = int(counters[-1])
        if len(lost):
            yield start + int(lost[0]) * stride, None, False
            return
        start += len(rows) * stride


def _stride(read: FileBytes) -> tuple[int, int]:
    """Bytes from sync byte to sync byte, and where the first is."""
    data = read(0, _SEARCHED_BYTES)
    for first in range(len(data) // 2):
        for stride in _STRIDES:
            syncs = data[first::stride][:_SYNCS_NEEDED]
            if len(syncs) == _SYNCS_NEEDED and set(syncs) == {_SYNC}:
                return stride, first
    return 188, 0


def _times(content: bytes) -> tuple[int, int]:
    """When a picture is shown and decoded, in ticks of 1/90000 s."""
    shown = _time(content[9:14])
    return shown, _time(content[14:19]) if content[7] & 0x40 else shown


def _time(field: bytes) -> int:
    return (field[0] >> 1 & 7) << 30 | field[1] << 22 | field[2] >> 1 << 15 | field[3] << 7 | field[4] >> 1


def _follows(times: list[int]) -> bool:
    """Whether the last picture comes no later after the one before than pictures usually do."""
    steps = np.diff(times)
    return len(steps) > 1 and 0 < steps[-1] <= _FOLLOWS * float(np.median(steps[:-1]))
