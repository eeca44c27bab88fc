"""How long a video is: by its own frames, or by what its header states."""

from pathlib import Path

import av
import numpy as np

from stages.decode.frames import DecodeError, LengthRequest, VideoLength
from stages.decode.pyav_reader import damage_remark, decoded_timeline, proved_before_s
from stages.decode.timeline import Timeline
from stages.decode.video_file import ffmpeg_messages, list_packets, open_video


def video_length(request: LengthRequest) -> VideoLength:
    """Find a file's length; frames are decoded only where packets carry no timestamps or the file is damaged.

    Raises:
        DecodeError: the file is no readable video, or carries no times and no clock is given.
    """
    with ffmpeg_messages() as messages:
        if request.by_header and (stated_s := _stated_s(request.path)) is not None:
            return VideoLength(stated_s)
        packets = list_packets(request.path, messages)
        if request.damaged == "refuse":
            packets.refuse_damaged()
        if packets.damage is None and packets.ticks is not None:
            shown = np.sort(packets.ticks[packets.is_shown])
            return VideoLength(Timeline(shown, packets.time_base, packets.last_duration_ticks).end_s)
        timeline, damage = decoded_timeline(request.path, request.damaged, request.clock_fps, packets, messages)
    if damage is None:
        return VideoLength(timeline.end_s)
    proved_s = proved_before_s(timeline, packets)
    if proved_s == 0:
        raise DecodeError("unreadable", damage)
    return VideoLength(proved_s, damage_remark(damage, proved_s))


def _stated_s(path: Path) -> float | None:
    with open_video(path) as (container, stream):
        if container.duration is not None:
            return float(container.duration / av.time_base)
        return None if stream.duration is None else float(stream.duration * stream.time_base)
