"""The structure of Matroska and WebM: elements within elements, blocks of known tracks, and checksums, if any."""

import zlib
from collections.abc import Sequence
from typing import Any

from stages.decode.structure_file import Break, FileBytes, Packet

_EBML, _SEGMENT, _CLUSTER, _INFO, _TRACKS = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1549A966, 0x1654AE6B
_CRC, _VOID = 0xBF, 0xEC
_SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK = 0xA3, 0xA0, 0xA1
_TRACK_ENTRY, _TRACK_NUMBER = 0xAE, 0xD7

# A segment also holds seek heads, cues, attachments, chapters and tags; a cluster its time and other numbers.
_IN_FILE = frozenset((_EBML, _SEGMENT, _VOID))
_IN_SEGMENT = frozenset(
    (_CLUSTER, _INFO, _TRACKS, _CRC, _VOID, 0x114D9B74, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367)
)
_IN_CLUSTER = frozenset((_SIMPLE_BLOCK, _BLOCK_GROUP, _CRC, _VOID, 0xE7, 0xA7, 0xAB, 0xAF, 0x5854))
_CHECKED = frozenset((_CLUSTER, _INFO, _TRACKS))

_HEAD_BYTES = 12
_CHUNK_BYTES = 2**20


def matroska_break(read: FileBytes, _stream: Any, _packets: Sequence[Packet]) -> Break | None:
    """Walk segments, clusters and blocks. A segment or cluster of unknown length ends where the next one begins.

    Where a cluster is not as long as its elements together, any of them may be missing.
    """
    at = last = cluster = segment_end = cluster_end = 0
    is_open = False  # the cluster's length is unknown
    tracks: set[int] = set()
    while at + 2 <= read.size:
        name, header, length = _element(read(at, _HEAD_BYTES))
        within = _IN_CLUSTER if at < cluster_end else _IN_SEGMENT if at < segment_end else _IN_FILE
        if is_open and name in _IN_SEGMENT - _IN_CLUSTER:
            within, cluster_end, is_open = _IN_SEGMENT, at, False
        if name not in within:
            after_all = within is _IN_FILE and segment_end > 0
            is_misplaced = name in _IN_FILE | _IN_SEGMENT | _IN_CLUSTER
            why = f"no element of this place begins at byte {at}"
            return None if after_all else Break(min(last, cluster) if is_misplaced else last, why)
        end = at + header + length
        if name == _SEGMENT:
            segment_end = end if length >= 0 else read.size
        elif name == _CLUSTER:
            cluster, cluster_end, is_open = (at, end, False) if length >= 0 else (at, segment_end, True)
        elif length < 0 or end > read.size:
            return Break(at, f"the element at byte {at} is longer than the file")
        elif within is _IN_CLUSTER and end > cluster_end:
            return Break(cluster, f"the element at byte {at} is longer than its place")
        if name in _CHECKED and length > 0 and end <= read.size and not _checksum_fits(read, at + header, end):
            return Break(at, f"the checksum of the element at byte {at} is wrong")
        if name == _TRACKS:
            tracks |= _track_numbers(read(at + header, length))
        if tracks and not tracks.issuperset(_track_of_block(read, name, at + header, end)):
            return Break(at, f"the block at byte {at} belongs to no track")
        last, at = at, at + header if name in (_SEGMENT, _CLUSTER) else end
    return None


def _element(head: bytes) -> tuple[int, int, int]:
    """Identifier, bytes of the header and length of the content (-1: unknown); an identifier of -1 is none."""
    name_bytes = 9 - head[0].bit_length() if head else 9
    if name_bytes > 4 or len(head) <= name_bytes:
        return -1, 0, 0
    length_bytes, length = _number(head[name_bytes:])
    return int.from_bytes(head[:name_bytes], "big"), name_bytes + length_bytes, length


def _number(head: bytes) -> tuple[int, int]:
    """Bytes and value of a number whose first byte gives how many follow; -1 where all its bits are set."""
    count = 9 - head[0].bit_length() if head else 9
    if count > 8 or len(head) < count:
        return 1, 0
    largest = (1 << 7 * count) - 1
    value = int.from_bytes(head[:count], "big") & largest
    return count, -1 if value == largest else value


def _checksum_fits(read: FileBytes, at: int, end: int) -> bool:
    """Whether an element that begins with a checksum of the rest of itself has that checksum."""
    head = read(at, 6)
    if head[:2] != b"\xbf\x84":
        return True
    checksum = 0
    for start in range(at + 6, end, _CHUNK_BYTES):
        checksum = zlib.crc32(read(start, min(_CHUNK_BYTES, end - start)), checksum)
    return checksum == int.from_bytes(head[2:], "little")


def _track_numbers(content: bytes) -> set[int]:
    found, at = set(), 0
    while at < len(content):
        name, header, length = _element(content[at : at + _HEAD_BYTES])
        if name < 0:
            break
        if name == _TRACK_NUMBER:
            found.add(int.from_bytes(content[at + header : at + header + length], "big"))
        at += header if name == _TRACK_ENTRY else header + length
    return found


def _track_of_block(read: FileBytes, name: int, at: int, end: int) -> set[int]:
    """The track that a block belongs to, as a set; a group of blocks holds one; other elements hold none."""
    if name == _SIMPLE_BLOCK:
        return {_number(read(at, 8))[1]}
    while name == _BLOCK_GROUP and at < end:
        inner, header, length = _element(read(at, _HEAD_BYTES))
        if inner == _BLOCK:
            return {_number(read(at + header, 8))[1]}
        if inner < 0 or length < 0:
            return {-1}
        at += header + length
    return set()
