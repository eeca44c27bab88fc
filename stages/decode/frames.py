"""What is asked of a decoder, what comes back, and how it fails; the only types that cross the process boundary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from stages.errors import UserError

DecoderName = Literal["pyav", "decord", "torchcodec"]
DecodeDevice = Literal["cpu", "cuda"]
DamagedRule = Literal["use", "refuse"]
FailureKind = Literal["unreadable", "missing", "out_of_range", "refused", "unreachable", "timeout", "crash", "memory"]

_MAX_REASON_CHARS = 600


class DecodeError(Exception):
    """One video could not be decoded, for the one-line `reason`.

    Kinds: "unreadable" (damaged, cut short or not a video), "missing" (no such file), "out_of_range" (a time outside
    the video), "refused" (not opened on purpose, or not safe with this decoder), "unreachable" (not to be had from its
    address), "timeout", "crash" and "memory" (the decode child was ended, died, or reached its memory limit).

    `whole_before_s` (seconds after the first frame shown) is set where a file is "unreadable" only from there on: a
    request whose times are all below it, with `damaged="use"`, succeeds with a remark.
    """

    def __init__(self, kind: FailureKind, reason: str, whole_before_s: float | None = None) -> None:
        assert kind in get_args(FailureKind), kind
        line = " ".join(reason.split())[:_MAX_REASON_CHARS]
        super().__init__(kind, line)
        self.kind: FailureKind = kind
        self.reason = line
        self.whole_before_s = whole_before_s

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class FrameRequest:
    """The frames shown at `times_s` of one local video file, in one or more sizes.

    Args:
        path: a regular file on a local file system.
        times_s: [T] float64, ascending (repeats allowed), seconds after the first frame shown.
        sizes_px: (height, width) of each wanted view.
        decoder: "pyav" (right for every format it opens), "decord" or "torchcodec" (subsets, see their readers).
        tolerance_s: how far a time may be outside the video and still get the nearest frame.
        device: "cuda" decodes on a GPU, with torchcodec only; its colours are not those of the CPU.
        damaged: "use" gives frames that are before all damage and are proved to be untouched by it, with a remark;
            "refuse" gives nothing of a damaged file.
        clock_fps: frames per second of a file that carries no times at all; a file's own times are always preferred.

    Raises `UserError` for an unknown decoder, or one that does not decode on the device.
    """

    path: Path
    times_s: np.ndarray
    sizes_px: tuple[tuple[int, int], ...]
    decoder: DecoderName
    tolerance_s: float
    device: DecodeDevice = "cpu"
    damaged: DamagedRule = "use"
    clock_fps: float | None = None

    def __post_init__(self) -> None:
        if self.decoder not in get_args(DecoderName):
            raise UserError("unknown decoder", received=self.decoder, allowed=", ".join(get_args(DecoderName)))
        if self.device != "cpu" and self.decoder != "torchcodec":
            raise UserError("only torchcodec decodes on a GPU", received=self.decoder, hint="use decoder torchcodec")
        assert self.times_s.ndim == 1, self.times_s.shape
        assert self.times_s.dtype == np.float64, self.times_s.dtype
        assert len(self.times_s) > 0, "no times asked for"
        assert np.isfinite(self.times_s).all(), "times must be finite"
        assert (np.diff(self.times_s) >= 0).all(), "times must be ascending"
        assert self.sizes_px, "no view asked for"
        assert all(height > 0 and width > 0 for height, width in self.sizes_px), self.sizes_px
        assert self.tolerance_s >= 0, self.tolerance_s
        assert self.damaged in get_args(DamagedRule), self.damaged
        assert self.clock_fps is None or self.clock_fps > 0, self.clock_fps


@dataclass(frozen=True)
class DecodedVideo:
    """The frames of one request.

    `shown_s` [T] float64 holds the timestamps of the frames returned (seconds after the first frame shown), `views`
    one array [T, height, width, 3] uint8 RGB per wanted size. `remark` is one line where the file is damaged but none
    of the frames asked for is; None for a whole file.
    """

    shown_s: np.ndarray
    views: tuple[np.ndarray, ...]
    remark: str | None = None

    @classmethod
    def empty_for(cls, request: FrameRequest) -> "DecodedVideo":
        """Allocate arrays of the request's shapes, with undefined content."""
        count = len(request.times_s)
        views = tuple(np.empty((count, height, width, 3), dtype=np.uint8) for height, width in request.sizes_px)
        return cls(shown_s=np.empty(count, dtype=np.float64), views=views)


@dataclass(frozen=True)
class LengthRequest:
    """Which file's length is asked for; `damaged` and `clock_fps` as in `FrameRequest`.

    `by_header` takes what the header states, where it states anything: no packet is read then.
    """

    path: Path
    by_header: bool = False
    damaged: DamagedRule = "use"
    clock_fps: float | None = None


@dataclass(frozen=True)
class VideoLength:
    """Seconds from the first frame's appearance to the last one's end; up to the damage, which `remark` names."""

    seconds: float
    remark: str | None = None
