"""Frames with decord, for the files on which it was found to give the same frames and pixels as PyAV.

decord 0.6 counts key frames in file order and frames in display order and compares the two, so on many files it returns
wrong frames without an error, and on some it hangs or uses up all memory. Therefore PyAV reads the packets first,
files outside the checked kinds are refused, and decord is asked for exact frame numbers, never for times. One weakness
remains: where the data of a picture are damaged, decord may return what it made of them instead of an error.
"""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stages.decode.frames import DecodeError, FrameRequest
from stages.decode.pyav_reader import FrameSink, is_mirrored, rows_by_frame
from stages.decode.timeline import Timeline
from stages.decode.video_file import PacketList, ffmpeg_messages, list_packets, open_video
from stages.errors import UserError

_CONTAINERS = frozenset({"mov", "matroska"})
_CODECS = frozenset({"h264", "vp8", "vp9"})
_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
_IDR_SLICE = 5  # H.264 NAL unit type of a picture that nothing after it looks behind


def read_with_decord(request: FrameRequest, sink: FrameSink) -> None:
    """Send every frame asked for to `sink`, in time order.

    Raises `DecodeError` ("refused" for a file that decord cannot be trusted with), and `UserError` without decord.
    """
    decord = _import_decord()
    with ffmpeg_messages():
        packets = list_packets(request.path)
        _refuse_unchecked(request.path, packets)
    assert packets.ticks is not None
    ticks = np.sort(packets.ticks)
    timeline = Timeline(ticks, packets.time_base, packets.last_duration_ticks)
    chosen = timeline.choose(request)
    try:
        # One thread: with its default, decord fails on VP9, and children run side by side anyway.
        reader = decord.VideoReader(str(request.path.absolute()), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(ticks):
            raise _refusal(f"it counts {len(reader)} frames where the file has {len(ticks)}")
        for index, rows in rows_by_frame(chosen):
            sink(rows, float(timeline.shown_s[index]), reader[index].asnumpy())
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise DecodeError("unreadable", f"decord: {str(error).splitlines()[0] if str(error) else 'failed'}") from error


def _import_decord() -> Any:
    try:
        import decord
    except ImportError:
        raise UserError(
            "decord is not installed; it is offered for x86-64 processors only", hint="use decoder pyav"
        ) from None
    return decord


def _refusal(why: str) -> DecodeError:
    return DecodeError("refused", f"not safe with decord: {why}; use decoder pyav")


def _refuse_unchecked(path: Path, packets: PacketList) -> None:
    with open_video(path) as (container, stream):
        decoder = stream.codec_context
        container_name, codec = container.format.name.split(",")[0], decoder.codec.canonical_name
        if container_name not in _CONTAINERS:
            raise _refusal(f"its frame numbers were not right in {container_name} files (mp4 and matroska were)")
        if codec not in _CODECS:
            raise _refusal(f"it returns wrong frames of, or cannot open, {codec} video (h264, vp8 and vp9 were right)")
        if decoder.pix_fmt not in _PIXEL_FORMATS or decoder.width % 2 or decoder.height % 2:
            raise _refusal("its colours agree with FFmpeg's for 8-bit 4:2:0 pictures with even sides only")
        if packets.ticks is None or len(np.unique(packets.ticks)) != len(packets.ticks):
            raise _refusal("the packets do not all have a timestamp of their own")
        if not packets.is_shown.all() or packets.ticks.min() < 0:
            raise _refusal("it shows the frames that this file's edit list hides")
        if codec == "h264" and not _every_key_frame_is_idr(container, stream):
            raise _refusal("it returns wrong frames where GOPs are open (a key frame without an IDR picture)")
    with open_video(path) as (container, stream):
        if any(is_mirrored(frame) for frame in islice(container.decode(stream), 1)):
            raise _refusal("it turns pictures as the display matrix says but does not mirror them")


def _every_key_frame_is_idr(container: Any, stream: Any) -> bool:
    """Look into the key packets, whose NAL units are each preceded by their length in both allowed containers."""
    extradata = stream.codec_context.extradata or b""
    if len(extradata) < 5 or extradata[0] != 1:
        return False
    length_bytes = (extradata[4] & 3) + 1
    return all(
        _IDR_SLICE in _nal_types(bytes(packet), length_bytes)
        for packet in container.demux(stream)
        if packet.is_keyframe
    )


def _nal_types(data: bytes, length_bytes: int) -> set[int]:
    types, position = set(), 0
    while position + length_bytes < len(data):
        length = int.from_bytes(data[position : position + length_bytes], "big")
        types.add(data[position + length_bytes] & 0x1F)
        position += length_bytes + length
    return types
