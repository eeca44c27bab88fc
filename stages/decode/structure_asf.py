"""The structure of ASF (WMV): packets of one size, each filled by its payloads, whose objects are numbered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.decode.structure_file import Break, FileBytes, Packet

_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_HEADER_BYTES = 30
_OBJECT_HEAD_BYTES = 24
_DATA_HEAD_BYTES = 50
_FIELD_BYTES = (0, 1, 2, 4)  # by the two bits that give a field's width


@dataclass(frozen=True)
class _Payload:
    number: int
    number_bytes: int
    offset: int
    object_bytes: int
    length: int


def asf_break(read: FileBytes, stream: Any, _packets: Sequence[Packet]) -> Break | None:
    """Follow the stream's numbered objects through all packets; each must begin after the last one is whole."""
    start, packet_bytes, count = _layout(read)
    if packet_bytes <= 0:
        return Break(0, "no data packets of one size")
    begun = start  # the packet in which the last object begins
    last: _Payload | None = None
    got = 0
    for at in range(start, start + count * packet_bytes, packet_bytes):
        data = read(at, packet_bytes)
        if len(data) < packet_bytes:
            return None if not data else Break(begun, "the file ends within a packet")
        payloads = _payloads(data, stream.id)
        if payloads is None:
            return Break(begun, f"the packet at byte {at} is not filled by its payloads")
        for payload in payloads:
            if last is not None and not _follows(payload, last, got):
                return Break(begun, f"an object is missing before byte {at}")
            if payload.offset == 0:
                begun, got = at, 0
            last, got = payload, got + payload.length
    return None


def _follows(payload: _Payload, last: _Payload, got: int) -> bool:
    if payload.offset > 0:
        return (payload.number, payload.offset) == (last.number, got)
    return payload.number == (last.number + 1) % (1 << 8 * payload.number_bytes) and got == last.object_bytes


def _layout(read: FileBytes) -> tuple[int, int, int]:
    """Where the packets begin, their size (0: not one size), and how many there are."""
    at, size = _HEADER_BYTES, 0
    end = int.from_bytes(read(16, 8), "little")
    while at + _OBJECT_HEAD_BYTES <= end:
        head = read(at, 104)
        if head[:16] == _PROPERTIES:
            smallest, largest = (int.from_bytes(head[place : place + 4], "little") for place in (92, 96))
            size = smallest if smallest == largest else 0
        length = int.from_bytes(head[16:24], "little")
        if length < _OBJECT_HEAD_BYTES:
            return 0, 0, 0
        at += length
    head = read(end, _DATA_HEAD_BYTES)
    if head[:16] != _DATA or size == 0:
        return 0, 0, 0
    stated = int.from_bytes(head[40:48], "little")
    start = end + _DATA_HEAD_BYTES
    return start, size, stated or -(-(read.size - start) // size)


class _Fields:
    """Reads one field after the other, each as wide as two bits state."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> int:
        value = int.from_bytes(self.data[self.at : self.at + count], "little")
        self.at += count
        return value

    def wide(self, kind: int) -> int:
        return self.take(_FIELD_BYTES[kind & 3])


def _payloads(data: bytes, ident: int) -> list[_Payload] | None:
    """The payloads of stream number `ident` in one packet, None where the packet makes no sense."""
    fields = _Fields(data)
    if data[0] & 0x80:
        if data[0] != 0x82:
            return None
        fields.at = 3
    kinds, widths = fields.take(1), fields.take(1)
    packet_bytes = fields.wide(kinds >> 5)
    fields.wide(kinds >> 1)
    padding = fields.wide(kinds >> 3)
    fields.at += 6  # when to send it, and for how long
    end = len(data) - padding - (len(data) - packet_bytes if 0 < packet_bytes < len(data) else 0)
    many = fields.take(1) if kinds & 1 else 1
    found: list[_Payload] = []
    for _ in range(many & 0x3F):
        stream = fields.take(1) & 0x7F
        number = fields.wide(widths >> 4)
        offset = fields.wide(widths >> 2)
        described = fields.wide(widths)
        object_bytes = int.from_bytes(data[fields.at : fields.at + 4], "little") if described >= 8 else 0
        fields.at += described
        length = fields.wide(many >> 6) if kinds & 1 else end - fields.at
        fields.at += length
        if length < 0 or fields.at > end:
            return None
        if stream == ident and described >= 8:
            found.append(_Payload(number, _FIELD_BYTES[widths >> 4 & 3], offset, object_bytes, length))
    return found if fields.at == end else None
