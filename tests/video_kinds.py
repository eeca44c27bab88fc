"""Kinds of video files for the decoders' tests: how each is made, and which decoders are right on it."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.video_files import RATE_FPS, write_video

GOP_24 = {"g": "24", "bf": "3", "preset": "fast"}
REALTIME = {"deadline": "realtime", "cpu-used": "8", "g": "48"}
OPEN_GOP = {"x264-params": "open-gop=1:keyint=24:bframes=3"}
X265 = "log-level=none:keyint=24:rc-lookahead=10"
VFR_TICKS = [int(tick) for tick in np.cumsum([20, 40, 20, 100, 60, 20] * 16)]
VFR_BASE = Fraction(1, 600)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        ending: of the file's name.
        codec: FFmpeg's name of the encoder.
        arguments: of `write_video`.
        decord: words of the reason for which decord refuses it; None where it is right.
        torchcodec: likewise.
        first: number of the first picture shown, where an edit list or a cut hides those before.
    """

    ending: str
    codec: str
    arguments: dict[str, Any] = field(default_factory=dict)
    decord: str | None = None
    torchcodec: str | None = None
    first: int = 0

    def write(self, stem: Path) -> Path:
        """Encode a file of this kind."""
        return write_video(stem.with_suffix(f".{self.ending}"), self.codec, **self.arguments)

    @property
    def times_s(self) -> np.ndarray:
        """When each picture was meant to be shown, from the first one shown on."""
        ticks = self.arguments.get("ticks") or list(range(self.arguments.get("count", 96)))
        base = self.arguments.get("time_base", Fraction(1, RATE_FPS))
        shown = ticks[self.first :]
        return np.array([float((tick - shown[0]) * base) for tick in shown])


def _x264(**arguments: Any) -> dict[str, Any]:
    return {"options": GOP_24, **arguments}


NOT_IDR = "GOPs are open or a key frame is none"
KINDS = {
    "h264, GOP 250": Kind("mp4", "libx264", {"options": {**GOP_24, "g": "250", "b-pyramid": "normal"}}),
    "h264, GOP 24": Kind("mp4", "libx264", _x264()),
    "h264, index in front": Kind("mp4", "libx264", _x264(container_options={"movflags": "faststart"})),
    "h264, fragmented": Kind(
        "mp4", "libx264", _x264(container_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"})
    ),
    "h264, matroska": Kind("mkv", "libx264", _x264()),
    "h264, full range": Kind("mp4", "libx264", _x264(pix_fmt="yuvj420p")),
    "h264, open GOP": Kind("mkv", "libx264", {"options": {**GOP_24, **OPEN_GOP}}, decord=NOT_IDR, torchcodec=NOT_IDR),
    "h264, open GOP, mp4": Kind(
        "mp4", "libx264", {"options": {**GOP_24, **OPEN_GOP}}, decord=NOT_IDR, torchcodec=NOT_IDR
    ),
    "h264, intra refresh": Kind(
        "mp4",
        "libx264",
        {"options": {"x264-params": "intra-refresh=1:keyint=24:bframes=0"}},
        decord=NOT_IDR,
        torchcodec=NOT_IDR,
    ),
    "h264, variable rate": Kind("mp4", "libx264", _x264(ticks=VFR_TICKS, time_base=VFR_BASE)),
    "h264, variable rate, matroska": Kind("mkv", "libx264", _x264(ticks=VFR_TICKS, time_base=VFR_BASE)),
    "h264, edit list": Kind("mp4", "libx264", _x264(shift_ticks=-31), decord="edit list", first=31),
    "h264, MPEG-TS": Kind("ts", "libx264", _x264(), decord="mpegts files", torchcodec="mpegts files"),
    "h264, AVI (no presentation times)": Kind("avi", "libx264", _x264(), decord="avi files", torchcodec="avi files"),
    "h264, late start, mp4": Kind("mp4", "libx264", _x264(shift_ticks=30 * RATE_FPS)),
    "h264, late start, matroska": Kind("mkv", "libx264", _x264(shift_ticks=30 * RATE_FPS)),
    "h264, late start, MPEG-TS": Kind(
        "ts", "libx264", _x264(shift_ticks=30 * RATE_FPS), decord="mpegts files", torchcodec="mpegts files"
    ),
    "h264, 10 bits": Kind("mp4", "libx264", _x264(pix_fmt="yuv420p10le"), decord="8-bit", torchcodec="8-bit"),
    "hevc, 10 bits": Kind(
        "mp4",
        "libx265",
        {"options": {"x265-params": X265}, "pix_fmt": "yuv420p10le", "count": 48},
        decord="hevc video",
        torchcodec="8-bit",
    ),
    "h264, 4:4:4": Kind("mp4", "libx264", _x264(pix_fmt="yuv444p", count=48), decord="not yuv444p"),
    "h264, 4:2:2, 10 bits": Kind(
        "mkv", "libx264", _x264(pix_fmt="yuv422p10le", count=48), decord="8-bit", torchcodec="8-bit"
    ),
    "h264, interlaced": Kind(
        "mp4",
        "libx264",
        {"options": {**GOP_24, "x264-params": "tff=1:keyint=24"}, "count": 48},
        decord="interlaced",
        torchcodec="interlaced",
    ),
    "mpeg2, interlaced": Kind(
        "ts",
        "mpeg2video",
        {"options": {"g": "12", "b": "2000k", "flags": "+ilme+ildct"}, "max_b_frames": 2},
        decord="mpegts files",
        torchcodec="mpegts files",
    ),
    "h264, odd size": Kind("mkv", "libx264", _x264(pix_fmt="yuv444p", height=97, width=129), decord="not yuv444p"),
    "h264, cropped size": Kind("mp4", "libx264", _x264(height=98, width=130)),
    "h264, non-square pixels": Kind("mp4", "libx264", _x264(sample_aspect_ratio=Fraction(4, 3), count=48)),
    "h264, one frame": Kind("mp4", "libx264", _x264(count=1)),
    "h264, 4K": Kind(
        "mp4", "libx264", {"options": {"g": "2", "preset": "ultrafast"}, "height": 2160, "width": 3840, "count": 3}
    ),
    "hevc, open GOP": Kind("mp4", "libx265", {"options": {"x265-params": X265}}, decord="hevc video"),
    "hevc, cut at an open GOP": Kind(
        "ts",
        "libx265",
        {"options": {"x265-params": X265}, "from_key_frame": 1},
        decord="mpegts files",
        torchcodec="mpegts files",
        first=24,
    ),
    "hevc, temporal layers": Kind(
        "mkv", "libx265", {"options": {"x265-params": X265 + ":temporal-layers=3:bframes=8"}}, decord="hevc video"
    ),
    "hevc, false key frames": Kind(
        "mp4",
        "libx265",
        {"options": {"x265-params": X265}, "mark_key_every": 10},
        decord="hevc video",
        torchcodec=NOT_IDR,
    ),
    "mpeg2 in MPEG-TS": Kind(
        "ts",
        "mpeg2video",
        {"options": {"g": "12", "b": "2000k"}, "max_b_frames": 2},
        decord="mpegts files",
        torchcodec="mpegts files",
    ),
    "mpeg2, cut at an open GOP": Kind(
        "ts",
        "mpeg2video",
        {"options": {"g": "12", "b": "2000k"}, "max_b_frames": 2, "from_key_frame": 1},
        decord="mpegts files",
        torchcodec="mpegts files",
        first=12,
    ),
    "mpeg2 program stream": Kind(
        "mpg",
        "mpeg2video",
        {"options": {"g": "12", "b": "2000k"}, "max_b_frames": 2},
        decord="mpeg files",
        torchcodec="mpeg files",
    ),
    "mpeg4 AVI, B-frames": Kind(
        "avi", "mpeg4", {"options": {"g": "24"}, "max_b_frames": 2}, decord="avi files", torchcodec="avi files"
    ),
    "mpeg4": Kind(
        "mp4", "mpeg4", {"options": {"g": "24"}, "max_b_frames": 2}, decord="mpeg4 video", torchcodec="mpeg4 video"
    ),
    "mpeg4, false key frames": Kind(
        "mp4",
        "mpeg4",
        {"options": {"g": "48"}, "max_b_frames": 2, "mark_key_every": 10},
        decord="mpeg4 video",
        torchcodec="mpeg4 video",
    ),
    "vp9": Kind("webm", "libvpx-vp9", {"options": REALTIME}),
    "vp9, odd size, hidden frames": Kind(
        "webm",
        "libvpx-vp9",
        {
            "options": {"cpu-used": "8", "g": "48", "lag-in-frames": "16", "auto-alt-ref": "1"},
            "height": 97,
            "width": 129,
        },
        decord="even sides",
        torchcodec="even sides",
    ),
    "vp8, hidden frames": Kind(
        "webm", "libvpx", {"options": {"cpu-used": "8", "lag-in-frames": "16", "auto-alt-ref": "1"}, "count": 40}
    ),
    "av1": Kind("mp4", "libsvtav1", {"options": {"preset": "10", "g": "48", "crf": "8"}}, decord="av1 video"),
    "gif": Kind(
        "gif",
        "gif",
        {"pix_fmt": "rgb8", "ticks": [4 * index for index in range(96)], "time_base": Fraction(1, 100)},
        decord="gif files",
    ),
    "motion jpeg": Kind("avi", "mjpeg", {"pix_fmt": "yuvj420p"}, decord="avi files", torchcodec="avi files"),
}
