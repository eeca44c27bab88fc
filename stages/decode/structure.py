"""Where a container's own structure breaks: lengths that lead nowhere, counters that jump, wrong checksums.

FFmpeg looks for the next element that makes sense and goes on without a word. What it left out shifts all later
pictures of a file whose time counts chunks, and leaves a picture standing in any other.
"""

import os
import string
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.decode.structure_asf import asf_break
from stages.decode.structure_file import Break, FileBytes, Packet
from stages.decode.structure_matroska import matroska_break
from stages.decode.structure_ts import mpegts_break

_FOURCC = frozenset((string.ascii_letters + string.digits + " _").encode())
_RIFF_ENTERED = (b"AVI ", b"AVIX", b"movi", b"rec ")
_FLV_TAGS = (8, 9, 18)  # sound, pictures, data

_Chunk = tuple[bytes, int, int]  # name, start, length of the content


def first_break(path: Path, container: str, stream: Any, packets: Sequence[Packet]) -> Break | None:
    """Walk the structure of a file of FFmpeg's format `container` (the first of its names); None where it is whole.

    `stream` is PyAV's video stream, `packets` what was read of it.

    Containers other than AVI, Matroska, FLV, ASF and MPEG-TS are not looked into: None.
    """
    walk = _WALKS.get(container)
    if walk is None:
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        return walk(FileBytes(file), stream, packets)
    except (IndexError, OSError, OverflowError) as error:  # lengths that damage made up lead anywhere
        return Break(0, f"its structure cannot be followed ({error})")
    finally:
        os.close(file)


def _avi_break(read: FileBytes, stream: Any, packets: Sequence[Packet]) -> Break | None:
    """The index names what was read, or each chunk's length leads to the next chunk.

    The header's count of frames proves nothing: writers are off by a few. It decides where index and chunks
    differ.
    """
    named = _avi_index(read, stream.index, _avi_index_place(read))
    if named and _from_first(named) == _from_first([(one.place, one.size) for one in packets]):
        return None
    chunks, broken = _avi_chunks(read)
    if broken is not None:
        return broken
    found = [(at, length) for name, at, length in chunks if _stream_of(name) == stream.index and length > 0]
    named = named or _avi_index(read, stream.index, next((at for name, at, _ in chunks if name == b"idx1"), None))
    if stream.frames > len(found) > 0 and int.from_bytes(read(4, 4), "little") + 8 > read.size and not named:
        return Break(found[-1][0], f"the file ends after {len(found)} of {stream.frames} frames")
    if len(named) <= len(found) or stream.frames != len(named):
        return None
    same = [ours == theirs for ours, theirs in zip(_from_first(found), _from_first(named), strict=False)]
    lost = same.index(False) if False in same else len(found)
    return Break(found[max(0, lost - 1)][0], f"{len(named)} frames in the index, {len(found)} in the file")


def _from_first(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Count from the first place on: an index counts from the file's beginning or from that of its list."""
    first = places[0][0] if places else 0
    return [(at - first, length) for at, length in places]


def _avi_chunks(read: FileBytes) -> tuple[list[_Chunk], Break | None]:
    chunks: list[_Chunk] = []
    at, last, end = 0, 0, 0
    while at + 8 <= read.size:
        head = read(at, 12)
        if not _is_fourcc(head) and at & 1 == 0 and _is_fourcc(read(at - 1, 4)):
            at -= 1  # some writers leave out the padding of odd lengths
            continue
        if not _is_fourcc(head):
            return chunks, None if at >= end > 0 else Break(last, f"no chunk begins at byte {at}")
        name, length = head[:4], int.from_bytes(head[4:8], "little")
        if name == b"RIFF":
            end = at + 8 + length
        if name in (b"RIFF", b"LIST") and head[8:12] in _RIFF_ENTERED:
            last, at = at, at + 12
            continue
        chunks.append((name, at, length))
        if at + 8 + length > read.size:
            # An index that is cut takes no frame with it.
            return chunks, None if name == b"idx1" else Break(at, "the file ends within a chunk")
        last, at = at, at + 8 + length + (length & 1)
    return chunks, None


def _avi_index_place(read: FileBytes) -> int | None:
    """Where the index is by the lengths of the lists before it."""
    at = 12
    while at + 8 <= read.size:
        head = read(at, 8)
        if head[:4] == b"idx1":
            return at
        if not _is_fourcc(head):
            return None
        length = int.from_bytes(head[4:], "little")
        at += 8 + length + (length & 1)
    return None


def _avi_index(read: FileBytes, stream: int, at: int | None) -> list[tuple[int, int]]:
    """Places and lengths of a stream's chunks by the index at byte `at`, without empty ones."""
    if at is None:
        return []
    content = read(at + 8, int.from_bytes(read(at + 4, 4), "little"))
    entries = struct.iter_unpack("<4sIII", content[: len(content) // 16 * 16])
    return [(place, size) for name, _, place, size in entries if _stream_of(name) == stream and size > 0]


def _is_fourcc(head: bytes) -> bool:
    return len(head) >= 4 and all(byte in _FOURCC for byte in head[:4])


def _stream_of(name: bytes) -> int | None:
    return int(name[:2]) if name[:2].isdigit() else None


def _flv_break(read: FileBytes, _stream: Any, _packets: Sequence[Packet]) -> Break | None:
    """Each tag is followed by its own length, and the next tag by that."""
    head = read(0, 9)
    at = int.from_bytes(head[5:9], "big") + 4
    last = at
    while at + 11 <= read.size:
        head = read(at, 11)
        kind, length = head[0] & 0x1F, int.from_bytes(head[1:4], "big")
        if kind not in _FLV_TAGS:
            return Break(last, f"no tag begins at byte {at}")
        after = at + 11 + length
        if after > read.size:
            return Break(at, "the file ends within a tag")
        repeated = int.from_bytes(read(after, 4), "big")
        if after + 4 <= read.size and repeated not in (length + 11, length):
            return Break(at, f"the tag at byte {at} is not as long as it states")
        last, at = at, after + 4
    return None


_WALKS: dict[str, Callable[[FileBytes, Any, Sequence[Packet]], Break | None]] = {
    "avi": _avi_break,
    "flv": _flv_break,
    "matroska": matroska_break,
    "asf": asf_break,
    "mpegts": mpegts_break,
}

# Where a whole structure proves that no packet was left out: those walked here, and files that list all their packets.
PROVED = frozenset((*_WALKS, "mov"))
