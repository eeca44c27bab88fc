"""Which files a decoder other than PyAV may be given: PyAV reads the packets first, and other kinds are refused.

The kinds named by each reader are those on which it gave the same frames and pixels as PyAV, to the byte.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from stages.decode.frames import DecodeError, FrameRequest
from stages.decode.pyav_reader import is_mirrored
from stages.decode.timeline import Timeline
from stages.decode.video_file import PacketList, demuxed, ffmpeg_messages, list_packets, open_video

_SHOWN_CHARS = 200


@contextmanager
def native_messages() -> Iterator[Callable[[], str]]:
    """Keep what is printed while the block runs, by this whole process; yields a function that returns its beginning.

    Not for several threads at once.
    """
    usual = os.dup(2)
    with tempfile.TemporaryFile() as printed:

        def beginning() -> str:
            text = os.pread(printed.fileno(), _SHOWN_CHARS, 0).decode("utf-8", "replace")
            return " ".join(text.split())

        os.dup2(printed.fileno(), 2)
        try:
            yield beginning
        finally:
            os.dup2(usual, 2)
            os.close(usual)


# NAL unit types of pictures at which decoding can start: an IDR picture in H.264, any random access picture in HEVC.
_H264_IDR = frozenset({5})
_HEVC_RANDOM_ACCESS = frozenset(range(16, 24))


@dataclass(frozen=True)
class CheckedKinds:
    """The kinds of file that a decoder was found right on.

    Args:
        decoder: its name.
        containers: FFmpeg's names (the first of several).
        codecs: FFmpeg's names.
        pixel_formats: FFmpeg's names.
        edit_lists: whether it hides the frames that an edit list hides.
    """

    decoder: str
    containers: frozenset[str]
    codecs: frozenset[str]
    pixel_formats: frozenset[str]
    edit_lists: bool

    def refusal(self, why: str) -> DecodeError:
        return DecodeError("refused", f"not safe with {self.decoder}: {why}; use decoder pyav")


def checked_timeline(request: FrameRequest, kinds: CheckedKinds) -> tuple[Timeline, float]:
    """Return the frames that the file shows, and the time of the first in the file's own clock, in seconds.

    Raises `DecodeError`: the file is damaged, or not of a kind that is safe ("refused").
    """
    with ffmpeg_messages() as messages:
        packets = list_packets(request.path, messages)
        packets.refuse_damaged()
        _refuse_unchecked(request, packets, kinds)
    assert packets.ticks is not None
    shown = np.sort(packets.ticks[packets.is_shown])
    return Timeline(shown, packets.time_base, packets.last_duration_ticks), float(shown[0] * packets.time_base)


def _refuse_unchecked(request: FrameRequest, packets: PacketList, kinds: CheckedKinds) -> None:
    with open_video(request.path) as (container, stream):
        decoder = stream.codec_context
        container_name, codec = container.format.name.split(",")[0], decoder.codec.canonical_name
        if container_name not in kinds.containers:
            right = ", ".join(sorted(kinds.containers))
            raise kinds.refusal(f"its frame numbers were not right in {container_name} files ({right} were)")
        if codec not in kinds.codecs:
            right = ", ".join(sorted(kinds.codecs))
            raise kinds.refusal(f"it returns wrong frames of, or cannot open, {codec} video ({right} were right)")
        if len(container.streams.video) > 1:
            raise kinds.refusal("the file has several video streams, and it may choose another")
        _refuse_colours(decoder, kinds)
        if packets.ticks is None or len(np.unique(packets.ticks)) != len(packets.ticks):
            raise kinds.refusal("the packets do not all have a timestamp of their own")
        hides = not packets.is_shown.all() or packets.ticks.min() < 0
        if not packets.is_shown.any() or (hides and not kinds.edit_lists):
            raise kinds.refusal("it shows the frames that this file's edit list hides")
        if codec in ("h264", "hevc") and not _every_key_frame_is_a_start(container, stream, codec):
            raise kinds.refusal("it returns wrong frames where GOPs are open or a key frame is none")
    with open_video(request.path) as (container, stream):
        for frame in islice(container.decode(stream), 1):
            if is_mirrored(frame):
                raise kinds.refusal("it turns pictures as the display matrix asks but does not mirror them")
            if frame.interlaced_frame:
                raise kinds.refusal("its colours of interlaced pictures are not PyAV's")


def _refuse_colours(decoder: Any, kinds: CheckedKinds) -> None:
    if decoder.pix_fmt not in kinds.pixel_formats:
        right = ", ".join(sorted(kinds.pixel_formats))
        raise kinds.refusal(f"its colours agree with PyAV's for 8-bit pictures of {right} only, not {decoder.pix_fmt}")
    if "420" in decoder.pix_fmt and (decoder.width % 2 or decoder.height % 2):
        raise kinds.refusal("its colours agree with PyAV's for 4:2:0 pictures with even sides only")


def _every_key_frame_is_a_start(container: Any, stream: Any, codec: str) -> bool:
    """Look into the key packets, whose NAL units are each preceded by their length in the allowed containers."""
    extradata = stream.codec_context.extradata or b""
    size_at = 4 if codec == "h264" else 21  # in avcC and in hvcC
    if len(extradata) <= size_at or extradata[0] != 1:
        return False
    length_bytes = (extradata[size_at] & 3) + 1
    starts = _H264_IDR if codec == "h264" else _HEVC_RANDOM_ACCESS
    return all(
        not starts.isdisjoint(_nal_types(bytes(packet), length_bytes, codec))
        for packet in demuxed(container, stream)
        if packet.is_keyframe
    )


def _nal_types(data: bytes, length_bytes: int, codec: str) -> set[int]:
    types, position = set(), 0
    while position + length_bytes < len(data):
        length = int.from_bytes(data[position : position + length_bytes], "big")
        header = data[position + length_bytes]
        types.add(header & 0x1F if codec == "h264" else header >> 1 & 0x3F)
        position += length_bytes + length
    return types
