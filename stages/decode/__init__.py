"""Frames by time from video files, in a killable child (`DecodeChild`), or in process (`reader.decode`)."""

from stages.decode.attempts import Attempts
from stages.decode.child import DecodeChild
from stages.decode.frames import (
    DamagedRule,
    DecodeDevice,
    DecodedVideo,
    DecodeError,
    DecoderName,
    FailureKind,
    FrameRequest,
    LengthRequest,
    VideoLength,
)

__all__ = [
    "Attempts",
    "DamagedRule",
    "DecodeChild",
    "DecodeDevice",
    "DecodeError",
    "DecodedVideo",
    "DecoderName",
    "FailureKind",
    "FrameRequest",
    "LengthRequest",
    "VideoLength",
]
