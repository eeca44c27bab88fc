"""Decoding in a separate program that can be ended: a file that hangs, crashes or fills memory costs one error."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from stages import own_code
from stages.decode.frames import DecodeDevice, DecodedVideo, DecodeError, FrameRequest, LengthRequest, VideoLength
from stages.decode.wire import request_message, to_line, view_offsets
from stages.errors import UserError
from stages.wording import GIB

# Pictures of 4096 x 4096 were seen to need 128 to 256 MiB; 8K pictures of 10 bits with 16 reference frames would need
# about 2 GiB.
_MEMORY_GB = 4.0

# Importing torch takes a second or two, and far longer from a cold network disk.
_START_LIMIT_S = 180.0

# How long a child that has closed its answers may take to end by itself and so show its own exit status.
_LAST_WORDS_S = 5.0

_READ_BYTES = 65_536
_STDERR_TAIL_CHARS = 300


class DecodeChild:
    """A persistent child program that decodes one video at a time, within a time limit and a memory limit.

    The child starts on the first `decode`, or earlier in the background by `start`. After a timeout, a crash or a
    memory failure the next `decode` starts a new one. It uses one thread, and ends with its parent.
    Not for use by several threads at once.

    Args:
        memory_gb: address space in GiB for one video, on top of the libraries' own (enforced on Linux).
        device: "cuda" lets it see the GPUs. There is no memory limit then: CUDA reserves more address space than there
            is memory.
    """

    def __init__(self, *, memory_gb: float = _MEMORY_GB, device: DecodeDevice = "cpu") -> None:
        self._memory_bytes = int(memory_gb * GIB) if device == "cpu" else 0
        # In it the child finds this package and no reason to start threads.
        without_gpu = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        self._environment = {**os.environ, **own_code.environment(), "OMP_NUM_THREADS": "1", **without_gpu}
        self._buffer = _open_buffer()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._stderr_tail = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The running child's process id, None where no child runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the child without waiting for it; does nothing while one runs."""
        if self.pid is not None:
            return
        self._stop()
        # Linux ties a child's life to the thread that started it. Only the main thread surely lives long enough;
        # elsewhere the child notices the end of its parent by the closed pipe.
        parent_pid = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        buffer_fd = self._buffer.fileno()
        self._process = subprocess.Popen(  # noqa: S603 - our own program and numbers
            [
                *(sys.executable, "-P", "-m", "stages.decode.child_main"),
                *(str(number) for number in (buffer_fd, self._memory_bytes, parent_pid)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(buffer_fd,),
            env=self._environment,
        )
        self._is_ready, self._stderr_tail = False, ""

    def begin(self) -> None:
        """Wait until a child is ready for a request; `DecodeError` with the reason where it does not start."""
        self.start()
        if self._is_ready:
            return
        try:
            self._receive(_START_LIMIT_S, "starting")
        except BaseException:
            self._stop()
            raise
        self._is_ready = True

    def decode(self, request: FrameRequest, deadline_s: float) -> DecodedVideo:
        """Decode one request into fresh arrays; `deadline_s` counts from when the child is ready to begin.

        Raises `DecodeError` with the reason, and `UserError` where the request's decoder is not installed.
        """
        self.begin()
        self._buffer.truncate(view_offsets(request)[-1])
        self._buffer.seek(0)
        self._buffer.write(np.ascontiguousarray(request.times_s).data.cast("B"))
        try:
            answer = self._check(self._ask({"request": request_message(request)}, deadline_s, "decoding"))
            return replace(self._copy_out(request), remark=answer["remark"])
        finally:
            self._buffer.truncate(0)  # hands the memory back

    def length(self, request: LengthRequest, deadline_s: float) -> VideoLength:
        """Find how long a video is; raises `DecodeError` with the reason."""
        self.begin()
        answer = self._check(self._ask({"request": request_message(request)}, deadline_s, "reading its length"))
        return VideoLength(answer["length_s"], answer["remark"])

    @contextmanager
    def local_copy(self, url: str, *, folder: str | None, limit_bytes: int, deadline_s: float) -> Iterator[Path]:
        """Fetch `url` into a temporary file in `folder` (None: the system's) and yield its path, good in children too.

        On Linux the file has no name: however this process ends, the system gives its room back.

        Raises:
            DecodeError: the file cannot be had, is too large, or takes too long.
            UserError: no driver for the protocol, or the folder takes no file.
        """
        make = tempfile.TemporaryFile if sys.platform == "linux" else tempfile.NamedTemporaryFile
        try:
            copy = make(dir=folder)
        except OSError as error:
            where, hint = folder or tempfile.gettempdir(), "set extract.scratch to another folder"
            raise UserError(f"nothing can be written here ({error.strerror})", where=where, hint=hint) from error
        with copy:
            path = Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}" if sys.platform == "linux" else copy.name)
            self.begin()
            message = {"fetch": url, "target": str(path), "limit_bytes": limit_bytes}
            self._check(self._ask(message, deadline_s, "fetching"))
            yield path

    def close(self) -> None:
        """End the child and release the buffer; the object cannot be used again."""
        self._stop()
        self._buffer.close()

    def _ask(self, message: dict[str, Any], limit_s: float, doing: str) -> dict[str, Any]:
        assert self._process is not None
        try:
            _open(self._process.stdin).write(to_line({**message, "deadline_s": limit_s}))
            return self._receive(limit_s, doing)
        except BrokenPipeError:
            raise self._crash("before it began") from None
        except BaseException:
            self._stop()  # also on Ctrl-C: what it would still answer must not meet the next request
            raise

    def _receive(self, limit_s: float, doing: str) -> dict[str, Any]:
        """Wait for one line, keeping the end of what the child prints."""
        assert self._process is not None
        stdout, stderr = self._process.stdout, self._process.stderr
        line, until = b"", time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(_open(stdout), selectors.EVENT_READ, stdout)
            selector.register(_open(stderr), selectors.EVENT_READ, stderr)
            while not line.endswith(b"\n"):
                ready = selector.select(max(0.0, until - time.monotonic()))
                if not ready or time.monotonic() > until:
                    raise DecodeError("timeout", f"{doing} took longer than {limit_s:g} s; the child was ended")
                for key, _ in ready:
                    chunk = os.read(key.fd, _READ_BYTES)
                    if key.data is stderr:
                        self._keep_tail(chunk)
                        if not chunk:
                            selector.unregister(key.fileobj)
                    elif not chunk:
                        raise self._crash(f"while {doing}")
                    else:
                        line += chunk
        message: dict[str, Any] = json.loads(line)
        return message

    def _check(self, answer: dict[str, Any]) -> dict[str, Any]:
        kind = answer["error"]
        if kind is None:
            return answer
        if kind == "user":
            raise UserError(answer["reason"])
        if kind == "memory":
            self._stop()  # what failed to find memory may have left the libraries in any state
        raise DecodeError(kind, answer["reason"], answer["whole_before_s"])

    def _copy_out(self, request: FrameRequest) -> DecodedVideo:
        video = DecodedVideo.empty_for(request)
        self._buffer.seek(0)
        for array in (video.shown_s, *video.views):
            rest = array.data.cast("B")
            while len(rest) > 0:
                count = self._buffer.readinto(rest)
                assert count, "the child cut the buffer short"
                rest = rest[count:]
        return video

    def _crash(self, when: str) -> DecodeError:
        """Reap a child that is gone; the error names how it ended."""
        assert self._process is not None
        try:
            status = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        while chunk := os.read(_open(self._process.stderr).fileno(), _READ_BYTES):
            self._keep_tail(chunk)
        how = (
            f"ended with status {status}"
            if status >= 0
            else f"was ended by signal {-status} ({signal.strsignal(-status)})"
        )
        printed = f"; it last printed: {self._stderr_tail}" if self._stderr_tail.strip() else ""
        self._stop()
        return DecodeError("crash", f"the decode child {how} {when}{printed}")

    def _keep_tail(self, chunk: bytes) -> None:
        self._stderr_tail = (self._stderr_tail + chunk.decode("utf-8", "replace"))[-_STDERR_TAIL_CHARS:]

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            _open(pipe).close()
        self._process = None


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _open_buffer() -> Any:
    """Memory that both programs hold open and that has no name, so that no crash can leave it behind."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("decoded-frames"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
