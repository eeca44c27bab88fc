"""The decode child: `python -m stages.decode.child_main BUFFER_FD MEMORY_BYTES PARENT_PID`.

Started by `DecodeChild`; answers requests on standard input until that closes, which happens when the parent ends.
"""

import json
import os
import queue
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from stages.decode.frames import DecodeError, FrameRequest, LengthRequest
from stages.decode.wire import read_request, to_line, view_offsets, write_rows
from stages.errors import UserError
from stages.process_tree import die_with

# How long after its deadline a child whose parent is gone may go on before the kernel ends it.
_ORPHAN_GRACE_S = 5.0


def main() -> None:
    """Serve requests for ever; the reading thread ends the process."""
    buffer_fd, memory_bytes, parent_pid = (int(argument) for argument in sys.argv[1:4])
    # The answer pipe is ours: whatever libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    if parent_pid:
        die_with(parent_pid)
    requests = _read_requests()

    import torch

    from stages.decode import pyav_reader, reader  # noqa: F401 - before the limit, which counts from here on

    torch.set_num_threads(1)
    _limit_resources(memory_bytes)
    answers.write(to_line({"ready": True}))
    while True:
        message = requests.get()
        # The default action of SIGALRM ends the process even inside a loop of a decoder's.
        signal.setitimer(signal.ITIMER_REAL, message["deadline_s"] + _ORPHAN_GRACE_S)
        answer = _answer(message, buffer_fd)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(to_line(answer))


def _answer(message: dict[str, Any], buffer_fd: int) -> dict[str, Any]:
    try:
        if "fetch" in message:
            from stages.decode.fetch import fetch_into

            fetch_into(message["fetch"], Path(message["target"]), limit_bytes=message["limit_bytes"])
            return {"error": None}
        request = read_request(message["request"], buffer_fd)
        if isinstance(request, LengthRequest):
            from stages.decode.length import video_length

            length = video_length(request)
            return {"error": None, "length_s": length.seconds, "remark": length.remark}
        return {"error": None, "remark": _decode(request, buffer_fd)}
    except DecodeError as error:
        return {"error": error.kind, "reason": error.reason, "whole_before_s": error.whole_before_s}
    except UserError as error:
        return {"error": "user", "reason": str(error)}


def _decode(request: FrameRequest, buffer_fd: int) -> str | None:
    from stages.decode.reader import decode_into

    offsets = view_offsets(request)

    def store(rows: slice, shown_s: float, pictures: list[np.ndarray]) -> None:
        write_rows(buffer_fd, 0, rows, np.array([shown_s], dtype=np.float64))
        for offset, picture in zip(offsets, pictures, strict=False):
            write_rows(buffer_fd, offset, rows, picture)

    return decode_into(request, store)


def _read_requests() -> "queue.SimpleQueue[dict[str, Any]]":
    """Read requests in a thread, so that the end of the parent is noticed during a decode too."""
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        # Unbuffered: a thread waiting inside sys.stdin would turn an error in the main thread into an abort.
        with open(0, "rb", buffering=0) as lines:
            for line in lines:
                requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def _limit_resources(memory_bytes: int) -> None:
    """Allow `memory_bytes` (0: no limit) of address space beyond what is mapped now (Linux), and no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if memory_bytes and statm.exists():
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, mapped + memory_bytes))


if __name__ == "__main__":
    main()
