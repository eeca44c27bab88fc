"""Frames with decord, for the files on which it was found to give the same frames and pixels as PyAV.

decord 0.6 counts key frames in file order and frames in display order and compares the two, so on many files it returns
wrong frames without an error, and on some it hangs or uses up all memory. Therefore PyAV reads the packets first,
files outside the checked kinds are refused, and decord is asked for exact frame numbers, never for times. What its
FFmpeg prints about damaged pictures is caught, because decord itself returns what was made of them.
"""

from typing import Any

from stages.decode.checked_files import CheckedKinds, checked_timeline, native_messages
from stages.decode.frames import DecodeError, FrameRequest
from stages.decode.pyav_reader import FrameSink, rows_by_frame
from stages.errors import UserError

_RIGHT_ON = CheckedKinds(
    decoder="decord",
    containers=frozenset({"mov", "matroska"}),
    codecs=frozenset({"h264", "vp8", "vp9"}),
    pixel_formats=frozenset({"yuv420p", "yuvj420p"}),
    edit_lists=False,
)


def read_with_decord(request: FrameRequest, sink: FrameSink) -> None:
    """Send every frame asked for to `sink`, in time order.

    Raises `DecodeError` ("refused" for a file that decord cannot be trusted with), and `UserError` without decord.
    """
    decord = _import_decord()
    timeline, _ = checked_timeline(request, _RIGHT_ON)
    chosen = timeline.choose(request)
    try:
        # One thread: with its default, decord fails on VP9, and children run side by side anyway.
        reader = decord.VideoReader(str(request.path.absolute()), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(timeline.ticks):
            raise _RIGHT_ON.refusal(f"it counts {len(reader)} frames where the file has {len(timeline.ticks)}")
        with native_messages() as printed:
            for index, rows in rows_by_frame(chosen):
                rgb = reader[index].asnumpy()
                if printed():
                    raise DecodeError("unreadable", f"damaged: {printed()}")
                sink(rows, float(timeline.shown_s[index]), rgb)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise DecodeError("unreadable", f"decord: {str(error).splitlines()[0] if str(error) else 'failed'}") from error


def _import_decord() -> Any:
    try:
        import decord
    except ImportError:
        raise UserError(
            "decord is not installed; it is offered for x86-64 processors only", hint="use decoder pyav"
        ) from None
    decord.logging.set_level(decord.logging.ERROR)
    return decord
