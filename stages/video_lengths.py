"""How long video files are, by their headers alone, read in a program of its own that can be ended.

As a program (`python -m stages.video_lengths`) it answers each path on standard input, a JSON line, with a JSON line.
"""

import json
import os
import resource
import selectors
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from stages import own_code

DEADLINE_S = 20.0
"""How long one file may take; a header is a few kilobytes, but a network disk may sleep."""

_MEMORY_BYTES = 4 * 2**30


def read_lengths(files: Mapping[str, Path], *, deadline_s: float = DEADLINE_S) -> Iterator[tuple[str, float | str]]:
    """Yield, for each named file in turn, its length in seconds, or why it is not known.

    A file that hangs or crashes the reader costs its deadline and one reason; the next one gets a new reader.
    """
    reader: _Reader | None = None
    try:
        for name, path in files.items():
            reader = reader or _Reader()
            answer = reader.ask(path, deadline_s)
            if answer is None:
                reason = reader.end()
                reader = None
                yield name, reason
            else:
                yield name, answer
    finally:
        if reader is not None:
            reader.end()


class _Reader:
    def __init__(self) -> None:
        self._is_late = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stages.video_lengths"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # or closing would try once more to write what a dead reader never took
            env={**os.environ, **own_code.environment(), "OMP_NUM_THREADS": "1"},
        )

    def ask(self, path: Path, deadline_s: float) -> float | str | None:
        """Length in seconds, or why it is not known; None if the reader took too long or is gone."""
        stdin, stdout = _open(self._process.stdin), _open(self._process.stdout)
        try:
            stdin.write(json.dumps(str(path.absolute())).encode("ascii") + b"\n")
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            self._is_late = not selector.select(deadline_s)
        line = b"" if self._is_late else stdout.readline()
        answer: float | str | None = json.loads(line) if line.endswith(b"\n") else None
        return answer

    def end(self) -> str:
        """End the program and say why its last file has no answer."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            _open(pipe).close()
        return "reading its header took too long" if self._is_late else "its header ended the program that read it"


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def header_length_s(path: Path) -> float:
    """Return the length that a file's header states, else the one by its frames' timestamps, in seconds.

    Raises:
        DecodeError: the file is no readable video.
    """
    import av

    from stages.decode.length import video_length_s
    from stages.decode.video_file import ffmpeg_messages, open_video

    with ffmpeg_messages(), open_video(path) as (container, stream):
        if container.duration is not None:
            return float(container.duration / av.time_base)
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
    return video_length_s(path)


def _serve() -> None:
    from stages.decode.frames import DecodeError

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for line in sys.stdin:
        answer: float | str
        try:
            answer = header_length_s(Path(json.loads(line)))
        except DecodeError as error:
            answer = error.reason
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
