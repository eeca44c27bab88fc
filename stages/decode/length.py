"""How long a video is, by its own frames."""

from pathlib import Path

import numpy as np

from stages.decode.frames import DecodeError
from stages.decode.timeline import Timeline
from stages.decode.video_file import ffmpeg_messages, list_packets


def video_length_s(path: Path) -> float:
    """Seconds from the first frame's appearance to the last one's end; no frame is decoded.

    Raises:
        DecodeError: the file is no readable video, or its packets carry no timestamps.
    """
    with ffmpeg_messages() as messages:
        packets = list_packets(path, messages)
        packets.refuse_damaged()
    if packets.ticks is None:
        raise DecodeError("unreadable", "the packets carry no timestamps, so the length is not known without decoding")
    shown = np.sort(packets.ticks[packets.is_shown])
    return Timeline(shown, packets.time_base, packets.last_duration_ticks).end_s
