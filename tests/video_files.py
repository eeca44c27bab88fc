"""Small video files for tests, whose pictures say which they are, and a slow, plain way to read them."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

RATE_FPS = 24


# Each picture carries its number as a row of black and white squares in its lower left corner, the lowest bit first.
_BITS, _BIT_PX = 8, 8


def pictures(count: int, height: int, width: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield moving noise [height, width, 3] uint8 in which no two pictures are alike; see `picture_number`."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 40, width // 4 + 40, 3), dtype=np.uint8)
    canvas = noise.repeat(4, axis=0).repeat(4, axis=1)
    for index in range(count):
        if index % 37 == 36:
            canvas = np.ascontiguousarray(canvas[::-1])  # a scene cut
        top, left = (index * 2) % 120, (index * 3) % 120
        picture = canvas[top : top + height, left : left + width].copy()
        picture[:16, :16] = (index * 5) % 256
        for bit in range(_BITS):
            picture[-_BIT_PX:, bit * _BIT_PX : (bit + 1) * _BIT_PX] = 255 * (index >> bit & 1)
        yield picture


def picture_number(rgb: np.ndarray) -> int:
    """Which of `pictures` an upright frame [h, w, 3] shows (modulo 256), whatever the coding has done to it."""
    squares = rgb[-_BIT_PX:, : _BITS * _BIT_PX].reshape(_BIT_PX, _BITS, _BIT_PX, 3).mean(axis=(0, 2, 3))
    return int(sum(1 << bit for bit in range(_BITS) if squares[bit] > 127))


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
    times_of_decoding: bool = False,
    sample_aspect_ratio: Fraction | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode `pictures`.

    `ticks` sets the frames' timestamps, `shift_ticks` moves the packets (in ticks of the encoder), `mark_key_every`
    marks packets as key frames that are none, packets before the key frame numbered `from_key_frame` are left out, and
    `times_of_decoding` writes when packets are decoded as when they are shown.
    """
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=RATE_FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.time_base = time_base
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
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
            if times_of_decoding:
                packet.pts = packet.dts
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


def turned_copy(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix (a, b, c, d) into the track header of an mp4."""
    data = bytearray(source.read_bytes())
    offset = data.find(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (number << 16 for number in matrix)
    struct.pack_into(">9i", data, offset, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target
