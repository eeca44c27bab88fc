"""Numbered videos with one damaged stretch of bytes, made from a seed: what a bad disk or a bad copy leaves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.decode import DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.video_files import RATE_FPS, picture_number, write_video

COUNT = 200
_HEIGHT, _WIDTH = 48, 64

_LENGTHS = (188, 512, 2048, 4096)
_DAMAGES = ("zero", "del", "dup", "bit", "junk")


@dataclass(frozen=True)
class Source:
    """One container and codec: ending of the file's name, encoder, arguments of `write_video`."""

    ending: str
    codec: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def write(self, stem: Path) -> Path:
        """Encode the numbered pictures, undamaged."""
        arguments = {"count": COUNT, "height": _HEIGHT, "width": _WIDTH, **self.arguments}
        return write_video(stem.with_suffix(f".{self.ending}"), self.codec, **arguments)


_X264 = {"options": {"g": "24", "bf": "2", "crf": "40", "preset": "fast"}}
_COARSE = {"g": "12", "qmin": "12", "qmax": "20"}
SOURCES = {
    "xvid": Source("avi", "mpeg4", {"options": _COARSE}),
    "xvid, B-frames": Source("avi", "mpeg4", {"options": _COARSE, "max_b_frames": 2}),
    "mjpeg": Source("avi", "mjpeg", {"options": {"qmin": "12", "qmax": "20"}, "pix_fmt": "yuvj420p"}),
    "mkv": Source("mkv", "libx264", _X264),
    "ts": Source("ts", "libx264", _X264),
    "flv": Source("flv", "libx264", _X264),
    "mp4": Source("mp4", "libx264", _X264),
    "wmv": Source("asf", "wmv2", {"options": _COARSE}),
    "vp9": Source("webm", "libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8", "g": "48", "crf": "50"}}),
}


def damage(data: bytes, seed: int) -> tuple[bytes, str]:
    """Damage one stretch of `data`; returns what was made of it, and how."""
    random = np.random.default_rng(seed)
    kind = _DAMAGES[seed % len(_DAMAGES)]
    at = int(random.integers(0, len(data)))
    length = 1 if kind == "bit" else int(random.choice(_LENGTHS))
    before, stretch, after = data[:at], data[at : at + length], data[at + length :]
    made = {
        "zero": bytes(len(stretch)),
        "del": b"",
        "dup": stretch * 2,
        "bit": bytes([stretch[0] ^ 1 << int(random.integers(0, 8))]),
        "junk": random.bytes(len(stretch)),
    }[kind]
    return before + made + after, f"{kind} {length} bytes at {at} of {len(data)}"


def pictures_at(path: Path, asked: list[int], **more: Any) -> np.ndarray:
    """The pictures [T, height, width, 3] shown in the middle of each numbered frame's time; raises `DecodeError`."""
    times_s = (np.array(asked) + 0.5) / RATE_FPS
    return decode(FrameRequest(path, times_s, ((_HEIGHT, _WIDTH),), "pyav", 0.1, **more)).views[0]


@dataclass
class Shown:
    """What a damaged file showed.

    `moved` pairs each number asked for with that of the whole file's picture that came instead of it; `spoilt` lists
    numbers whose picture is not like any of the whole file's; `refused` is the reason where there was one.
    """

    moved: list[tuple[int, int]] = field(default_factory=list)
    spoilt: list[int] = field(default_factory=list)
    refused: str | None = None


# Mean difference, in grey levels, up to which a picture is taken for another one of the same video.
_SAME = 4.0


def ask_damaged(path: Path, asked: list[int], whole: np.ndarray) -> Shown:
    """Ask for all numbers at once; where the file is damaged from a time on, once more for those before it."""
    shown = Shown()
    try:
        views = pictures_at(path, asked)
    except DecodeError as error:
        shown.refused = f"{error.kind}: {error.reason}"
        asked = [number for number in asked if (number + 0.5) / RATE_FPS < (error.whole_before_s or 0.0)]
        if not asked:
            return shown
        views = pictures_at(path, asked)
    for number, picture in zip(asked, views, strict=True):
        if picture_number(picture) == number:
            continue
        differences = np.abs(whole.astype(np.int16) - picture).mean(axis=(1, 2, 3))
        nearest = int(differences.argmin())
        if nearest != number and differences[nearest] <= _SAME:
            shown.moved.append((number, nearest))
        else:
            shown.spoilt.append(number)
    return shown
