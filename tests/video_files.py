"""Small video files of many kinds for tests, and a slow, plain way to read them."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

RATE_FPS = 24


def pictures(count: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield moving noise [height, width, 3] uint8 in which no two pictures are alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 40, width // 4 + 40, 3), dtype=np.uint8)
    canvas = noise.repeat(4, axis=0).repeat(4, axis=1)
    for index in range(count):
        if index % 37 == 36:
            canvas = np.ascontiguousarray(canvas[::-1])  # a scene cut
        top, left = (index * 2) % 120, (index * 3) % 120
        picture = canvas[top : top + height, left : left + width].copy()
        picture[:16, :16] = (index * 5) % 256
        yield picture


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    count: int = 96,
    height: int = 96,
    width: int = 128,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    max_b_frames: int | None = None,
    ticks: list[int] | None = None,
    time_base: Fraction = Fraction(1, RATE_FPS),
    shift_ticks: int = 0,
    mark_key_every: int | None = None,
    from_key_frame: int = 0,
) -> Path:
    """Encode `pictures`.

    `ticks` sets the frames' timestamps, `shift_ticks` moves the packets (in ticks of the encoder), `mark_key_every`
    marks packets as key frames that are none, and packets before the key frame numbered `from_key_frame` are left out.
    """
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE_FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.time_base = time_base
        if max_b_frames is not None:
            stream.codec_context.max_b_frames = max_b_frames
        packets = []
        for index, picture in enumerate(pictures(count, height, width)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = ticks[index] if ticks else index, time_base
            packets.extend(stream.encode(frame))
        packets.extend(stream.encode(None))
        starts = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        for index, packet in enumerate(packets[starts[from_key_frame] :]):
            packet.pts += shift_ticks
            packet.dts += shift_ticks
            packet.is_keyframe |= mark_key_every is not None and index % mark_key_every == 0
            container.mux(packet)
    return path


def read_plainly(path: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Decode every frame in order: their times in seconds after the first, and the frames as native RGB.

    A file without presentation times is taken to have a constant rate.
    """
    times, frames = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stores_times = container.format.name not in ("avi", "mpeg")
        for index, frame in enumerate(container.decode(stream)):
            times.append(frame.time if stores_times else index / RATE_FPS)
            frames.append(frame.to_ndarray(format="rgb24"))
    return np.array(times) - times[0], frames
