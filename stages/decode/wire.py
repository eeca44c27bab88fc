"""What `DecodeChild` and its child program send each other: JSON lines on pipes, arrays in one shared buffer.

The buffer holds `shown_s` [T] float64 and then each view [T, height, width, 3] uint8. The parent first puts the asked
times in the place of `shown_s`, so that they cross exactly and a message stays far smaller than a pipe's capacity.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from stages.decode.frames import FrameRequest, LengthRequest

_TIME_BYTES = np.dtype(np.float64).itemsize


def to_line(message: dict[str, Any]) -> bytes:
    """Encode one message as one line."""
    return json.dumps(message).encode("ascii") + b"\n"


def request_message(request: FrameRequest | LengthRequest) -> dict[str, Any]:
    """Describe a request; of times, which are in the buffer, their number."""
    message = {**vars(request), "path": str(request.path.absolute())}
    return {**message, "times_s": len(request.times_s)} if isinstance(request, FrameRequest) else message


def read_request(message: dict[str, Any], buffer_fd: int) -> FrameRequest | LengthRequest:
    """Rebuild a request from its message and the times in the buffer."""
    fields = {**message, "path": Path(message["path"])}
    if "times_s" not in message:
        return LengthRequest(**fields)
    times = os.pread(buffer_fd, message["times_s"] * _TIME_BYTES, 0)
    sizes_px = tuple((height, width) for height, width in message["sizes_px"])
    return FrameRequest(**{**fields, "times_s": np.frombuffer(times, dtype=np.float64), "sizes_px": sizes_px})


def view_offsets(request: FrameRequest) -> list[int]:
    """Return where each view begins in the buffer, and last where the buffer ends, in bytes."""
    count = len(request.times_s)
    offsets = [count * _TIME_BYTES]
    for height, width in request.sizes_px:
        offsets.append(offsets[-1] + count * height * width * 3)
    return offsets


def write_rows(buffer_fd: int, start: int, rows: slice, row: np.ndarray) -> None:
    """Write `row` to each of `rows` of an array that begins at byte `start` of the buffer."""
    for index in range(rows.start, rows.stop):
        written = os.pwrite(buffer_fd, row.data.cast("B"), start + index * row.nbytes)
        assert written == row.nbytes, (written, row.nbytes)
