"""Frames with torchcodec, on the CPU or with a GPU's decoder, for the files on which it was found right.

torchcodec 0.13 in its exact mode returns wrong frames without an error of MPEG-4 Part 2, of H.264 without IDR pictures
and of files whose key frames are none, repeats frames or fails in AVI and MPEG-TS, and converts the colours of deep,
interlaced and odd-sized pictures in another way than PyAV. Therefore PyAV reads the packets first, other kinds are
refused, and each frame's own timestamp, as torchcodec returns it, must be the one asked for. What FFmpeg prints about
damaged pictures is caught, because torchcodec returns what was made of them.
"""

import os
from importlib import import_module
from typing import Any

from stages.decode.checked_files import CheckedKinds, checked_timeline, native_messages
from stages.decode.frames import DecodeError, FrameRequest
from stages.decode.pyav_reader import FrameSink, rows_by_frame
from stages.errors import UserError

_RIGHT_ON = CheckedKinds(
    decoder="torchcodec",
    containers=frozenset({"mov", "matroska", "gif"}),
    codecs=frozenset({"h264", "hevc", "vp8", "vp9", "av1", "gif"}),
    pixel_formats=frozenset({"yuv420p", "yuvj420p", "yuv444p", "bgra"}),
    edit_lists=True,
)

# Timestamps come back as floats; half of the finest time base in use (MPEG's 90 kHz) is above their rounding.
_SAME_TIME_S = 5e-6

_INSTALL = "run pip install 'diff-lmm[torchcodec]', and have FFmpeg's shared libraries (4 to 8) on this machine"


def read_with_torchcodec(request: FrameRequest, sink: FrameSink) -> None:
    """Send every frame asked for to `sink`, in time order.

    Raises `DecodeError` ("refused" for a file that torchcodec cannot be trusted with), and `UserError` where it is not
    installed or does not load.
    """
    decoder_class = _import_torchcodec()
    timeline, first_s = checked_timeline(request, _RIGHT_ON)
    chosen = timeline.choose(request)
    try:
        # One thread, and one frame at a time: native frames of a whole video would not fit into the memory.
        decoder = decoder_class(
            str(request.path.absolute()), dimension_order="NHWC", num_ffmpeg_threads=1, device=request.device
        )
        if len(decoder) != len(timeline.ticks):
            raise _RIGHT_ON.refusal(f"it counts {len(decoder)} frames where the file has {len(timeline.ticks)}")
        with native_messages() as printed:
            for index, rows in rows_by_frame(chosen):
                shown_s = float(timeline.shown_s[index])
                frame = decoder.get_frame_at(index)
                if abs(frame.pts_seconds - first_s - shown_s) > _SAME_TIME_S:
                    raise _RIGHT_ON.refusal(
                        f"asked for the frame at {shown_s:.3f} s it returned that at {frame.pts_seconds - first_s:.3f}"
                    )
                if printed():
                    raise DecodeError("unreadable", f"damaged: {printed()}")
                _refuse_fallback(decoder, request)
                sink(rows, shown_s, frame.data.cpu().numpy())
    except (RuntimeError, ValueError, IndexError) as error:
        if "alloc" in str(error):
            raise DecodeError("memory", f"the memory limit was reached ({_last_line(error)})") from error
        raise DecodeError("unreadable", f"torchcodec: {_last_line(error)}") from error


def _refuse_fallback(decoder: Any, request: FrameRequest) -> None:
    """Where a GPU's decoder does not take a file, torchcodec decodes on the CPU, with other colours, and goes on."""
    if request.device != "cpu" and decoder.cpu_fallback:
        raise DecodeError("refused", f"the GPU's decoder does not take this video ({decoder.cpu_fallback})")


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _import_torchcodec() -> Any:
    os.environ["TORCHCODEC_FFMPEG_LOG_LEVEL"] = "ERROR"  # else its FFmpeg is silent about damage
    try:
        decoders = import_module("torchcodec.decoders")
    except ImportError:
        raise UserError("torchcodec is not installed", hint=_INSTALL) from None
    except (OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"torchcodec is installed but does not load ({first[:120]})", hint=_INSTALL) from error
    return decoders.VideoDecoder
