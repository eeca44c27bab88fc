"""Frames by timestamp with PyAV: decode what is needed, and prove that nothing is missing.

Native RGB is what FFmpeg's converter gives for the frame's own colour space and range, turned by the file's display
matrix. The pixel aspect ratio is not applied, and interlaced frames are not deinterlaced.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import PictureType

from stages.decode.frames import DamagedRule, DecodeError, FrameRequest
from stages.decode.timeline import Timeline
from stages.decode.video_file import (
    FFmpegMessages,
    PacketList,
    demuxed,
    ffmpeg_messages,
    frame_ticks,
    is_end_marker,
    list_packets,
    open_video,
    translated,
)


def _unnamed(cls: Any, value: object) -> Any:
    """A member for a kind of side data that PyAV has no name for; without one it cannot list any of a frame's."""
    member = object.__new__(cls)
    member._name_, member._value_ = f"UNNAMED_{value}", value
    return member


SideDataType._missing_ = classmethod(_unnamed)  # type: ignore[method-assign,assignment]

# So many key frames that are some make it odd that one is not.
_MANY_KEYS = 5

# The part of a file's timestamps that may be wrong by damage; those of decoding differ more often.
_FEW = 0.05

# From version 17 on PyAV converts a frame in several threads unless it is asked not to.
_ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}

# Receives rows of the request that one frame fills, its timestamp, and the frame [h, w, 3] uint8 RGB.
FrameSink = Callable[[slice, float, np.ndarray], None]


def read_with_pyav(request: FrameRequest, sink: FrameSink) -> str | None:
    """Send every frame asked for to `sink`, in time order; the pixels equal those of decoding the whole file.

    The first attempts skip pictures that nothing wanted depends on. Where one misses a wanted frame, or FFmpeg
    reports anything at all, the file is decoded again in full, and what fails or is reported then is the file's fault;
    frames sent twice are right the second time. Returns the remark of `DecodedVideo`. Raises `DecodeError`.
    """
    with ffmpeg_messages() as messages:
        packets = list_packets(request.path, messages)
        if request.damaged == "refuse":
            packets.refuse_damaged()
        may_skip = packets.damage is None and _has_simple_order(packets)
        if may_skip and _read_wanted_only(request, packets, sink, messages):
            return None
        return _read_in_full(request, packets, sink, messages)


def _has_simple_order(packets: PacketList) -> bool:
    """Whether packets name their frames: all have a distinct timestamp, in an order that the decoder can give."""
    ticks = packets.ticks
    if ticks is None or not packets.is_key[0] or not packets.is_shown.any():
        return False
    if not packets.reorders or _may_be_of_decoding(packets):
        return _ascend(ticks) and not packets.reorders
    return bool(ticks[0] == ticks.min() and len(np.unique(ticks)) == len(ticks))


def _may_be_of_decoding(packets: PacketList) -> bool:
    """Whether timestamps ascend though the decoder reorders pictures: in streams copied from a container without any.

    Only the frames that come out can show it.
    """
    return packets.reorders and len(packets.is_key) > 1 and packets.ticks is not None and _ascend(packets.ticks)


def _read_wanted_only(request: FrameRequest, packets: PacketList, sink: FrameSink, messages: FFmpegMessages) -> bool:
    """Decode only what the wanted frames need; return whether every one of them came out undisturbed."""
    assert packets.ticks is not None
    shown = np.sort(packets.ticks[packets.is_shown])
    timeline = Timeline(shown, packets.time_base, packets.last_duration_ticks)
    rows = rows_by_frame(timeline.choose(request))
    wanted = {int(shown[index]): (span, float(timeline.shown_s[index])) for index, span in rows}
    runs = needed_runs(packets, frozenset(wanted))
    attempts = [runs]
    if len(runs) > 1:
        # Key frames of an open GOP can disturb a fresh start; going through from the first packet needs none.
        attempts.append([(0, runs[-1][1])])
    for attempt in attempts:
        messages.clear()
        frames = decode_runs(request.path, attempt, frozenset(wanted))
        starts = frozenset(int(packets.ticks[first]) for first, _ in attempt if first > 0)
        keys = _KeyFrames(packets)
        if _send_wanted(frames, starts, keys, wanted, sink) and not messages and keys.false_one is None:
            return True
    return False


def _send_wanted(
    frames: Iterator[Any],
    starts: frozenset[int],
    keys: "_KeyFrames",
    wanted: dict[int, tuple[slice, float]],
    sink: FrameSink,
) -> bool:
    """Send the frames whose timestamp is wanted; return whether each came once, whole, and all frames in order.

    A picture of `starts`, where decoding begins in mid-file, must be a key frame by the codec's own word: some
    containers mark every packet as one, and some codecs give no word.
    """
    to_rgb = RgbConverter()
    found: list[int] = []
    previous: int | None = None
    try:
        for frame in frames:
            if frame.pts is None or (previous is not None and frame.pts <= previous):
                return False
            previous = frame.pts
            keys.look_at(frame)
            if frame.pts in starts and frame.pict_type != PictureType.I:
                return False
            if frame.pts in wanted and not frame.is_corrupt:
                sink(*wanted[frame.pts], to_rgb.convert(frame))
                found.append(frame.pts)
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        return False
    return found == sorted(wanted)


class _KeyFrames:
    """Compares the packets that the container marks as key frames with what comes out of them.

    Containers may mark many that are none. One among many right ones has become something else by damage; `false_one`
    is its timestamp then.
    """

    def __init__(self, packets: PacketList) -> None:
        self._marked = frozenset() if packets.ticks is None else frozenset(packets.ticks[packets.is_key].tolist())
        self._right = 0
        self._false: list[int] = []

    @property
    def false_one(self) -> int | None:
        return self._false[0] if len(self._false) == 1 and self._right >= _MANY_KEYS else None

    def look_at(self, frame: Any) -> None:
        if frame.pts in self._marked:
            if frame.pict_type == PictureType.I:
                self._right += 1
            else:
                self._false.append(frame.pts)


def rows_by_frame(indices: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Group an ascending index per row into (index, its rows)."""
    distinct, starts = np.unique(indices, return_index=True)
    ends = [*starts[1:], len(indices)]
    for index, start, end in zip(distinct, starts, ends, strict=True):
        yield int(index), slice(int(start), int(end))


def decode_runs(path: Path, runs: list[tuple[int, int]], wanted: frozenset[int]) -> Iterator[Any]:
    """Decode runs of packets (first and last position), leaving out pictures that nothing else refers to."""
    remaining = iter(runs)
    first, last = next(remaining)
    with open_video(path) as (container, stream):
        decoder = stream.codec_context
        decoder.open(strict=False)  # some decoders read `skip_frame` only here, and must not start by skipping
        for position, packet in enumerate(demuxed(container, stream)):
            if position < first:
                continue
            decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from decoder.decode(packet)
            if position == last:
                yield from decoder.decode(None)
                decoder.flush_buffers()
                first, last = next(remaining, (-1, -1))
                if last < 0:
                    return


def needed_runs(packets: PacketList, wanted: frozenset[int]) -> list[tuple[int, int]]:
    """The packets to decode, as (first, last) positions: from a key frame shown no later, to each wanted frame.

    Starting afresh at a key frame is what seeking does, without trusting the container's own index.
    """
    assert packets.ticks is not None
    ticks, keys = packets.ticks, np.flatnonzero(packets.is_key)
    needed: list[tuple[int, int]] = []
    for position in np.flatnonzero(np.isin(ticks, list(wanted))):
        usable = keys[(keys <= position) & (ticks[keys] <= ticks[position])]
        needed.append((int(usable[-1]), int(position)))
    runs: list[tuple[int, int]] = []
    for first, last in sorted(needed):
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(runs[-1][1], last))
        else:
            runs.append((first, last))
    return runs


def _read_in_full(request: FrameRequest, packets: PacketList, sink: FrameSink, messages: FFmpegMessages) -> str | None:
    """Decode the file twice: once for the timestamps of the frames shown, once for the wanted pictures.

    Decoding in order depends on earlier packets only: what comes out before the first damaged one is right.
    """
    timeline, damage = decoded_timeline(request.path, request.damaged, request.clock_fps, packets, messages)
    remark = None
    if damage is not None:
        proved_s = proved_before_s(timeline, packets)
        if request.times_s[-1] >= proved_s:
            raise DecodeError("unreadable", damage, whole_before_s=proved_s if proved_s > 0 else None)
        remark = damage_remark(damage, proved_s)
    wanted = dict(rows_by_frame(timeline.choose(request)))
    last, to_rgb = max(wanted), RgbConverter()
    for index, frame in enumerate(_decode_all(request.path, packets.whole, messages)):
        if index in wanted:
            sink(wanted[index], float(timeline.shown_s[index]), to_rgb.convert(frame))
        if index == last:
            break
    return remark


def proved_before_s(timeline: Timeline, packets: PacketList) -> float:
    """Before which time the frames that came out before damage are proved, in seconds after the first; 0 if none are.

    The last frame is not: how long it stays is not known, and damage that spares the end of a packet may have begun
    in it.
    """
    return max(0.0, float(timeline.shown_s[-1]) - timeline.rounding_s) if packets.is_proved else 0.0


def damage_remark(damage: str, proved_s: float) -> str:
    """The remark about a file that is damaged, but not before `proved_s`."""
    return f"damaged from about {proved_s:.2f} s on: {damage.removeprefix('damaged: ')}"


def _decode_all(path: Path, count: int, messages: FFmpegMessages) -> Iterator[Any]:
    """Yield every frame shown that the first `count` packets give, those held back at the file's end included.

    Damage before the first whole frame (a cut at an open GOP) leaves those frames out, unless it is in the first key
    frame itself. After it, a damaged frame or anything that FFmpeg reports raises `DecodeError`.
    """
    with open_video(path) as (container, stream):
        first = last = None
        key_seen = False
        for position, packet in enumerate(demuxed(container, stream)):
            if position >= count and not is_end_marker(packet):
                return
            is_first_key = packet.is_keyframe and not key_seen
            if is_first_key:
                key_seen = True
                messages.clear()
            frames = packet.decode()
            if is_first_key and messages:
                raise DecodeError("unreadable", f"damaged at its beginning: {messages}")
            for frame in frames:
                if first is not None and (frame.is_corrupt or messages):
                    why = str(messages) or "a picture is incomplete"
                    raise DecodeError("unreadable", f"damaged{_about(first, last)}: {why}")
                if frame.is_corrupt:
                    continue
                if first is None:
                    messages.clear()
                    first = _frame_time(frame)
                last = _frame_time(frame)
                yield frame
        if first is not None and messages:
            raise DecodeError("unreadable", f"damaged near its end: {messages}")


def _frame_time(frame: Any) -> Fraction | None:
    ticks = frame.dts if frame.pts is None else frame.pts
    return None if ticks is None else ticks * frame.time_base


def _about(first: Fraction | None, last: Fraction | None) -> str:
    """Where the last whole frame was seen; nothing where the file gives no times."""
    return "" if first is None or last is None else f" at about {float(last - first):.3f} s"


@dataclass(frozen=True)
class _Stamp:
    pts: int | None
    dts: int | None
    duration_ticks: int
    time_base: Fraction


def decoded_timeline(
    path: Path, damaged: DamagedRule, clock_fps: float | None, packets: PacketList, messages: FFmpegMessages
) -> tuple[Timeline, str | None]:
    """Decode the file up to its first damage: the frames before it, and what is damaged.

    Raises `DecodeError`: no frame comes out, the file is damaged and the rule is to refuse such, or it has no times.
    """
    with open_video(path) as (_, stream):
        one_frame = frame_ticks(stream, None)
    stamps: list[_Stamp] = []
    damage = packets.damage
    keys = _KeyFrames(packets)
    try:
        for frame in _decode_all(path, packets.whole, messages):
            keys.look_at(frame)
            stamps.append(_Stamp(frame.pts, frame.dts, frame.duration or one_frame, frame.time_base))
    except (DecodeError, av.error.FFmpegError) as error:
        found = error if isinstance(error, DecodeError) else translated(error, messages)
        if found.kind != "unreadable" or damaged == "refuse":
            raise found from error
        damage = found.reason
    if keys.false_one is not None:
        damage = "damaged: the picture of one key frame is none"
        if damaged == "refuse":
            raise DecodeError("unreadable", damage)
        stamps = [stamp for stamp in stamps if stamp.pts is None or stamp.pts <= keys.false_one]
    if not stamps:
        raise DecodeError("unreadable", damage or "no frame could be decoded")
    if not _may_be_of_decoding(packets):
        _refuse_few_out_of_order([stamp.pts for stamp in stamps])
    return _timeline(stamps, clock_fps if packets.ticks is None else None), damage


def _timeline(stamps: list[_Stamp], clock_fps: float | None) -> Timeline:
    """Take the shown frames' own timestamps or, where a container stores none, those of decoding order.

    Formats without presentation times (AVI) show one frame per decoding step, so the step at which a frame comes out
    is its time; frames that come out at the very end follow at the last frame's pace. Where there are no times of any
    kind, frames follow each other at `clock_fps`.
    """
    presentation = [stamp.pts for stamp in stamps]
    for ticks in (presentation, _extended([stamp.dts for stamp in stamps], stamps[-1].duration_ticks)):
        if None not in ticks and _ascend(np.array(ticks, dtype=np.int64)):
            return Timeline(np.array(ticks, dtype=np.int64), stamps[0].time_base, stamps[-1].duration_ticks)
    if clock_fps is not None:
        return Timeline(np.arange(len(stamps), dtype=np.int64), 1 / Fraction(clock_fps).limit_denominator(1001), 1)
    raise DecodeError("unreadable", "the frames carry no usable timestamps (writing the file as a new mp4 gives them)")


def _ascend(ticks: np.ndarray) -> bool:
    return bool((np.diff(ticks) > 0).all())


def _refuse_few_out_of_order(ticks: list[int | None]) -> None:
    """Timestamps that are those of decoding are out of order throughout; where a few are, some are wrong."""
    known = [tick for tick in ticks if tick is not None]
    wrong = int((np.diff(np.array(known, dtype=np.int64)) <= 0).sum())
    if len(known) == len(ticks) and 0 < wrong <= _FEW * len(ticks):
        raise DecodeError("unreadable", f"damaged: {wrong} of {len(ticks)} timestamps are out of order")


def _extended(ticks: list[int | None], step: int) -> list[int | None]:
    """Fill the gap at the end of a list of timestamps, `step` apart."""
    filled: list[int | None] = []
    for tick in ticks:
        previous = filled[-1] if filled else None
        filled.append(previous + step if tick is None and previous is not None else tick)
    return filled


class RgbConverter:
    """Turns PyAV frames into upright [h, w, 3] uint8 RGB; one per video, so that the converter is set up once."""

    def __init__(self) -> None:
        self._reformatter = av.video.reformatter.VideoReformatter()

    def convert(self, frame: Any) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray()
        return np.ascontiguousarray(_upright(rgb, frame))


def _upright(rgb: np.ndarray, frame: Any) -> np.ndarray:
    """Apply the display matrix: quarter turns and mirrorings, as FFmpeg's own program does."""
    a, b, c, d = _display_matrix(frame)
    if b == c == 0:
        return rgb[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    if a == d == 0:
        return rgb.transpose(1, 0, 2)[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]
    raise DecodeError("refused", f"the display matrix turns the picture by {frame.rotation} degrees, not quarter turns")


def is_mirrored(frame: Any) -> bool:
    """Whether the frame's display matrix mirrors it (just a turn does not)."""
    a, b, c, d = _display_matrix(frame)
    return a * d - b * c < 0


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """The numbers of x' = a x + c y, y' = b x + d y (scaled by 2**16), the identity where a file has none."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
    return a, b, c, d
