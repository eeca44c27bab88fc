"""Opening a local video file safely with PyAV, and listing its packets without decoding any."""

import errno
import re
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from stages.decode.alike import named_alike
from stages.decode.frames import DecodeError
from stages.decode.structure import PROVED, first_break
from stages.decode.structure_file import Packet

# Only self-contained files are opened: a playlist, session description or picture sequence could name any other file
# or address. Sound formats are listed so that a sound file fails for its true reason.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,nut,rm,mxf,dv,wtv,"
    "h264,hevc,mpegvideo,m4v,obu,wav,mp3,flac,aac,aiff,ac3,amr,caf,au,w64"
)
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}

# Above these a header is taken for damaged (or hostile) and no frame is allocated.
_MAX_SIDE_PX = 16_384
_MAX_PICTURE_PX = 150_000_000

_PROBED = re.compile(r"Format (\S+) probed")

# Of sizes that FFmpeg itself does not accept it forgets the numbers, and only its message has them.
_NO_SIZE = "the file does not state the size of its pictures"
_TOO_LARGE = re.compile(r"Picture size (\d+)x(\d+) is invalid")

# A video may lack this much of its declared duration before it counts as cut short. Containers round, and encoders
# drop a frame or two at the end; a time beyond the real end still fails as "out_of_range".
_SHORTFALL_S = 1.0
_SHORTFALL_FRACTION = 0.05

_MESSAGES_SHOWN = 3

# So many frames make a constant rate, and so far may rounding move a timestamp.
_FRAMES_OF_A_RATE = 50
_ROUNDED_TICKS = 1

# Messages below FFmpeg's level of errors that name damage.
_DAMAGE = ("concealing ",)

# Of these codecs FFmpeg passes over bits that are left at the end of a picture, as a wrong bit in it leaves them,
# unless an option forbids it. Some encoders leave bits there in every file: then one of the first pictures has them.
_ENDS_WITHOUT_MARK = frozenset({"msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2"})
_CHECK_ENDS = {"err_detect": "buffer"}
_PICTURES_TRIED = 24


@dataclass(frozen=True)
class PacketList:
    """The video packets of a file in decoding order (`K` of them).

    Args:
        ticks: [K] int64 presentation timestamps in units of `time_base`; None where the file leaves one out.
        is_key: [K] bool, decoding can start here.
        is_shown: [K] bool, false where an edit list hides the frame.
        last_duration_ticks: how long the last frame shown stays.
        reorders: whether the decoder shows pictures in another order than that of the packets.
        damage: what is wrong with the file, as far as its packets show; None where nothing is.
        whole: how many packets come before all damage; K for a whole file.
        is_proved: whether the container's structure proves that none was lost among those.
    """

    ticks: np.ndarray | None
    is_key: np.ndarray
    is_shown: np.ndarray
    last_duration_ticks: int
    time_base: Fraction
    reorders: bool
    damage: str | None
    whole: int
    is_proved: bool

    def refuse_damaged(self) -> None:
        if self.damage is not None:
            raise DecodeError("unreadable", self.damage)


class FFmpegMessages:
    """What FFmpeg has reported as an error or as damage; false while there is nothing."""

    def __init__(self, captured: list[tuple[int, str, str]]) -> None:
        self._captured = captured  # level, part of FFmpeg that reports it, text; grows while FFmpeg works

    def __bool__(self) -> bool:
        return bool(self._captured) and bool(self._texts())

    def __str__(self) -> str:
        """The last messages, each once, on one line."""
        return "; ".join(list(dict.fromkeys(self._texts()))[-_MESSAGES_SHOWN:])

    def clear(self) -> None:
        self._captured.clear()

    def _texts(self) -> list[str]:
        self._captured[:] = [one for one in self._captured if one[0] <= av.logging.ERROR or one[2].startswith(_DAMAGE)]
        return [text.strip() for _, _, text in self._captured]


@contextmanager
def ffmpeg_messages() -> Iterator[FFmpegMessages]:
    """Collect FFmpeg's messages while the block runs, and turn its exceptions and PyAV's own into `DecodeError`."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.INFO)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as captured:
            messages = FFmpegMessages(captured)
            try:
                yield messages
            except av.error.FFmpegError as error:
                raise translated(error, messages) from error
            except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
                if not _is_of_pyav(error):
                    raise
                raise DecodeError("unreadable", f"PyAV cannot read it: {type(error).__name__}: {error}") from error
            except DecodeError as error:
                size_px = _TOO_LARGE.search(str(messages))
                if error.reason != _NO_SIZE or size_px is None:
                    raise
                raise _too_large(int(size_px[1]), int(size_px[2])) from error
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


def _is_of_pyav(error: Exception) -> bool:
    """Whether the error came up inside PyAV, which raises Python's own for what it has no name for."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("av/") for name in files)


def translated(error: Any, messages: FFmpegMessages) -> DecodeError:
    """The error for one that FFmpeg raised."""
    reported = str(messages)
    if isinstance(error, MemoryError) or "get_buffer() failed" in reported:
        return DecodeError("memory", f"the memory limit was reached ({reported or 'allocation failed'})")
    if isinstance(error, PermissionError):
        return DecodeError("refused", "no permission to read the file")
    return DecodeError("unreadable", f"{error.strerror}{f' ({reported})' if reported else ''}")


def check_regular_file(path: Path) -> None:
    """Raise `DecodeError` unless `path` leads to a regular file with content; a FIFO or device would block."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        beside = "".join(f"; {names} is there" for names in named_alike([path]).values())
        raise DecodeError("missing", f"no such file: {path}{beside}") from None
    except (OSError, ValueError) as error:
        raise DecodeError("missing", f"{error}: {path}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError("refused", f"not a regular file ({stat.filemode(status.st_mode)}): {path}")
    if status.st_size == 0:
        raise DecodeError("unreadable", "the file is empty (0 bytes)")


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a local file and yield its PyAV container and first video stream, set to one decode thread.

    Cover pictures of sound files do not count as video. Use inside `ffmpeg_messages`. Raises `DecodeError`.
    """
    check_regular_file(path)
    name = f"file:{path.absolute()}"  # the prefix keeps a name such as "http:x.mp4" from being taken for an address
    with _opened(name) as container:
        # Made-up timestamps are wrong for reordered frames (seen with H.264 in AVI): better none.
        container.flags &= ~av.container.core.Flags.gen_pts.value
        stream = _video_stream(container)
        _check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = 1
        if stream.codec_context.codec.canonical_name in _ENDS_WITHOUT_MARK and _ends_are_clean(name):
            stream.codec_context.options = _CHECK_ENDS
        yield container, stream


def _ends_are_clean(name: str) -> bool:
    """Whether no bits are left at the ends of the first pictures."""
    with av.logging.Capture() as captured, _opened(name) as container:
        stream = _video_stream(container)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _CHECK_ENDS
        try:
            for _ in islice(container.decode(stream), _PICTURES_TRIED):
                pass
        except av.error.FFmpegError:
            return True  # damaged; whoever reads the file will find out
    return not any("junk bits" in text for _, _, text in captured)


def _opened(name: str) -> Any:
    try:
        return av.open(name, container_options=_OPEN_OPTIONS, metadata_errors="replace")
    except av.error.FFmpegError as error:
        found = _format_not_opened(name) if error.errno == errno.EINVAL else None
        if found is None:
            raise
        reason = f"FFmpeg takes it for {found!r}, which is not opened here: write it as a new mp4 or Matroska"
        raise DecodeError("refused", reason) from error


def _format_not_opened(name: str) -> str | None:
    """The format that FFmpeg takes a file for, where that is one that is not opened; it opens nothing."""
    level = av.logging.get_level()
    with av.logging.Capture() as captured:
        av.logging.set_level(av.logging.DEBUG)
        try:
            with suppress(av.error.FFmpegError):  # it fails again; this time its messages are kept
                av.open(name, container_options=_OPEN_OPTIONS)
        finally:
            av.logging.set_level(level)
    texts = " ".join(text for _, _, text in captured)
    probed = _PROBED.search(texts)
    return probed[1] if probed and "not on whitelist" in texts else None


def demuxed(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of the streams (of all, where none is named), and PyAV's end markers."""
    try:
        yield from container.demux(*streams)
    except IndexError:
        # A stream that began in mid-file has no place in PyAV's list. It finds out after the last packet, when it
        # makes the end markers, of which those of earlier streams have come.
        return


def _video_stream(container: Any) -> Any:
    """The first video stream; of a picture file, the first that is shown by itself (not a plane, not a tile)."""
    kinds = av.stream.Disposition
    pictures = kinds.attached_pic | kinds.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        has_sound = len(container.streams.audio) > 0
        raise DecodeError("unreadable", f"no video stream{' (audio only)' if has_sound else ''}")
    if container.format.name.startswith("mov"):
        streams = [stream for stream in streams if stream.disposition & kinds.default] or streams
    if streams[0].disposition & kinds.dependent:
        raise DecodeError("refused", "the picture is made of tiles, which are not put together")
    if streams[0].codec_context is None:
        raise DecodeError("unreadable", "no decoder for this video codec")
    return streams[0]


def _check_size(width_px: int, height_px: int) -> None:
    if width_px <= 0 or height_px <= 0:
        raise DecodeError("unreadable", _NO_SIZE)
    if max(width_px, height_px) > _MAX_SIDE_PX or width_px * height_px > _MAX_PICTURE_PX:
        raise _too_large(width_px, height_px)


def _too_large(width_px: int, height_px: int) -> DecodeError:
    return DecodeError(
        "refused",
        f"pictures of {width_px} x {height_px} pixels; at most {_MAX_SIDE_PX} a side and "
        f"{_MAX_PICTURE_PX // 1_000_000} million in all are decoded",
    )


def list_packets(path: Path, messages: FFmpegMessages) -> PacketList:
    """Read all packets of the file's video stream without decoding, and look for damage to the container.

    `messages` are those of the `ffmpeg_messages` around it.
    """
    with open_video(path) as (container, stream):
        messages.clear()  # opening looks into every stream, and damaged sound is no matter
        packets: list[Packet] = []
        spans: dict[int, _Span] = {}
        reported_at: int | None = None
        for packet in demuxed(container):
            if is_end_marker(packet):
                continue
            spans.setdefault(packet.stream_index, _Span()).add(packet)
            if packet.stream_index == stream.index:
                packets.append(Packet.of(packet))
            if messages and reported_at is None:
                reported_at = len(packets)
        if not packets:
            raise DecodeError("unreadable", "the video stream holds no frames")
        if messages and reported_at is None:
            reported_at = len(packets)
        found = _Evidence(len(packets))
        found.add(_shortfall(container, stream, spans), len(packets) - 1)
        corrupt = [position for position, packet in enumerate(packets) if packet.is_corrupt]
        if corrupt:
            found.add(f"damaged: {len(corrupt)} of {len(packets)} video packets are corrupt", corrupt[0])
        if reported_at is not None:
            found.add(f"damaged: {messages}", reported_at - 2)
        name = container.format.name.split(",")[0]
        broken = first_break(path, name, stream, packets)
        if broken is not None:
            found.add(f"damaged: {broken.why}", _packet_at(packets, broken.at))
        moved = None if name == "mov" else _moved_packet(packets)
        if moved is not None:
            found.add("damaged: one timestamp is off the constant rate of all others", moved)
        return _to_list(packets, stream, found, is_proved=name in PROVED)


def is_end_marker(packet: Any) -> bool:
    """Whether PyAV made this packet after the last one of a stream, to have the decoder give all that it holds."""
    return packet.size == 0 and packet.dts is None and packet.pts is None


def _moved_packet(packets: list[Packet]) -> int | None:
    """The packet whose timestamp alone is off a constant rate, which without it has one place free.

    Videos of variable rate have many such timestamps, and a legal gap has none.
    """
    ticks = [packet.ticks for packet in packets if packet.ticks is not None]
    if not _FRAMES_OF_A_RATE <= len(ticks) == len(packets):
        return None
    ordered = np.sort(np.array(ticks, dtype=np.int64))
    step = int(np.median(np.diff(ordered)))
    uneven = _uneven(ordered, step)
    if not 2 <= len(uneven) <= 3:
        return None
    for index in sorted({*uneven.tolist(), *(uneven + 1).tolist()} - {0, len(ordered) - 1}):
        others = np.delete(ordered, index)
        gaps = np.diff(others)[_uneven(others, step)]
        if len(gaps) == 1 and abs(int(gaps[0]) - 2 * step) <= 2 * _ROUNDED_TICKS:
            return ticks.index(int(ordered[index]))
    return None


def _uneven(ordered: np.ndarray, step: int) -> np.ndarray:
    return np.flatnonzero(np.abs(np.diff(ordered) - step) > _ROUNDED_TICKS)


class _Evidence:
    """Signs of damage: the words of the first one, and the packet before which there is none of any."""

    def __init__(self, count: int) -> None:
        self.reason: str | None = None
        self.first = count

    def add(self, reason: str | None, position: int) -> None:
        if reason is not None:
            self.reason = self.reason or reason
            self.first = max(0, min(self.first, position))


def _packet_at(packets: list[Packet], at: int) -> int:
    """The first packet that begins at byte `at` of the file or later; one that begins nowhere goes with the last."""
    return next((position for position, packet in enumerate(packets) if packet.place >= at), len(packets) - 1)


def _to_list(packets: list[Packet], stream: Any, found: _Evidence, *, is_proved: bool) -> PacketList:
    last = max(packets, key=lambda packet: (packet.is_shown, packet.ticks or 0))
    ticks = [packet.ticks for packet in packets]
    return PacketList(
        ticks=None if None in ticks else np.array(ticks, dtype=np.int64),
        is_key=np.array([packet.is_key for packet in packets], dtype=bool),
        is_shown=np.array([packet.is_shown for packet in packets], dtype=bool),
        last_duration_ticks=frame_ticks(stream, last.duration_ticks),
        time_base=stream.time_base,
        reorders=bool(stream.codec_context.has_b_frames),
        damage=found.reason,
        whole=found.first,
        is_proved=is_proved,
    )


class _Span:
    """What one stream's packets cover, in seconds."""

    def __init__(self) -> None:
        self.first_s = float("inf")
        self.end_s = float("-inf")

    def add(self, packet: Any) -> None:
        ticks = packet.dts if packet.pts is None else packet.pts
        if ticks is not None and packet.time_base:
            self.first_s = min(self.first_s, float(ticks * packet.time_base))
            self.end_s = max(self.end_s, float((ticks + (packet.duration or 0)) * packet.time_base))


def frame_ticks(stream: Any, duration_ticks: int | None) -> int:
    """How long a frame lasts: its own duration where the file gives one, else one period of the average rate."""
    if duration_ticks:
        return int(duration_ticks)
    return round(1 / (stream.average_rate * stream.time_base)) if stream.average_rate else 0


def _shortfall(container: Any, stream: Any, spans: dict[int, _Span]) -> str | None:
    """Compare what the packets cover with what the header promises; a file cut short gives no error otherwise."""
    declared_s = _own_duration_s(container, stream)
    covered = [spans[stream.index]]
    if declared_s is None and container.duration:
        # Only the whole file's duration is known. Sound may outlast the pictures, so every stream counts.
        declared_s = container.duration / av.time_base
        covered = list(spans.values())
    # Matroska and FLV declare when the last frame ends, others how long the stream is: a late start counts as covered.
    covered_s = max(span.end_s for span in covered) - min(0.0, *(span.first_s for span in covered))
    if declared_s is None or not np.isfinite(covered_s):
        return None
    if declared_s - covered_s <= max(_SHORTFALL_S, _SHORTFALL_FRACTION * declared_s):
        return None
    return f"truncated: the file holds {covered_s:.2f} s of the {declared_s:.2f} s its header promises"


def _own_duration_s(container: Any, stream: Any) -> float | None:
    """The stream's declared duration; Matroska gives it as a tag "hh:mm:ss.fraction".

    A tag may be older than the file, so it counts up to the file's own duration only, and not in other containers,
    where it is a copy of another file's.
    """
    if stream.duration:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":") if "matroska" in container.format.name else []
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return None
    tagged_s = hours * 3600 + minutes * 60 + seconds
    return min(tagged_s, container.duration / av.time_base) if container.duration else tagged_s
