"""Numbered videos with one damaged stretch of bytes, made from a seed: what a bad disk or a bad copy leaves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.decode import DecodeChild, DecodeError, FrameRequest
from tests.video_files import RATE_FPS, picture_number, write_video

COUNT = 200
_HEIGHT, _WIDTH = 48, 64
_HALF_FRAME = 0.5

LENGTHS = (188, 512, 2048, 4096)
DAMAGES = ("zero", "del", "dup", "bit", "junk")


@dataclass(frozen=True)
class Source:
    """One container and codec: ending of the file's name, encoder, arguments of `write_video`."""

    ending: str
    codec: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def write(self, stem: Path) -> Path:
        """Encode the numbered pictures, undamaged."""
        return write_video(
            stem.with_suffix(f".{self.ending}"),
            self.codec,
            **{"count": COUNT, "height": _HEIGHT, "width": _WIDTH, **self.arguments},
        )


_X264 = {"options": {"g": "24", "bf": "2", "crf": "40", "preset": "fast"}}
_QUANTIZER = {"g": "12", "qmin": "12", "qmax": "20"}
SOURCES = {
    "xvid": Source("avi", "mpeg4", {"options": _QUANTIZER}),
    "xvid, B-frames": Source("avi", "mpeg4", {"options": _QUANTIZER, "max_b_frames": 2}),
    "mjpeg": Source("avi", "mjpeg", {"options": {"qmin": "12", "qmax": "20"}, "pix_fmt": "yuvj420p"}),
    "mkv": Source("mkv", "libx264", _X264),
    "ts": Source("ts", "libx264", _X264),
    "flv": Source("flv", "libx264", _X264),
    "mp4": Source("mp4", "libx264", _X264),
    "wmv": Source("asf", "wmv2", {"options": _QUANTIZER}),
    "vp9": Source("webm", "libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8", "g": "48", "crf": "50"}}),
}


def damage(data: bytes, seed: int) -> tuple[bytes, str]:
    """Damage one stretch of `data`; returns what was made of it, and how."""
    random = np.random.default_rng(seed)
    kind = DAMAGES[seed % len(DAMAGES)]
    at = int(random.integers(0, len(data)))
    length = 1 if kind == "bit" else int(random.choice(LENGTHS))
    before, stretch, after = data[:at], data[at : at + length], data[at + length :]
    made = {
        "zero": bytes(len(stretch)),
        "del": b"",
        "dup": stretch * 2,
        "bit": bytes([stretch[0] ^ 1 << int(random.integers(0, 8))]),
        "junk": random.bytes(len(stretch)),
    }[kind]
    return before + made + after, f"{kind} {length} bytes at {at} of {len(data)}"


def wrong_pictures(child: DecodeChild, path: Path, asked: list[int]) -> tuple[list[tuple[int, int]], str]:
    """Ask for the middle of each numbered frame: (asked, shown) where they differ, and a refusal's reason."""
    times_s = (np.array(asked) + _HALF_FRAME) / RATE_FPS
    try:
        video = child.decode(FrameRequest(path, times_s, ((_HEIGHT, _WIDTH),), "pyav", 0.1), 30.0)
    except DecodeError as error:
        return [], f"{error.kind}: {error.reason}"
    shown = [picture_number(picture) for picture in video.views[0]]
    return [pair for pair in zip(asked, shown, strict=True) if pair[0] != pair[1]], ""
