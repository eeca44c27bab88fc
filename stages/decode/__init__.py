"""Frames by time from local video files: in a killable child (`DecodeChild`), or in process (`reader.decode`)."""

from stages.decode.attempts import Attempts, decode_or_retry
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
from stages.decode.local_copy import local_copy

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
    "decode_or_retry",
    "local_copy",
]
