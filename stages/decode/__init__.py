"""Frames by time from local video files: in a killable child (`DecodeChild`), or in process (`reader.decode`)."""

from stages.decode.attempts import decode_or_retry
from stages.decode.child import DecodeChild
from stages.decode.frames import DecodedVideo, DecodeError, DecoderName, FailureKind, FrameRequest

__all__ = [
    "DecodeChild",
    "DecodeError",
    "DecodedVideo",
    "DecoderName",
    "FailureKind",
    "FrameRequest",
    "decode_or_retry",
]
