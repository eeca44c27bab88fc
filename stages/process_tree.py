"""The processes that descend from this one, found and ended whoever started them (Linux; elsewhere none is found)."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_LIMIT_S = 5.0
_LOOK_AGAIN_S = 0.02
# Python's own, which removes named semaphores once everybody who used them has gone, and then ends.
_CLEANER = b"multiprocessing.resource_tracker"


def adopt_orphans() -> None:
    """Have descendants whose parent ends become children of this process, so that none goes out of sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> None:
    """SIGKILL every descendant of this process, and those that they start meanwhile."""
    until = time.monotonic() + _LIMIT_S
    while (left := _running(os.getpid())) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(_LOOK_AGAIN_S)


def _running(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: list[int] = []
    generation = children.get(ancestor, [])
    while generation:
        found += generation
        generation = [child for parent in generation for child in children.get(parent, [])]
    return [pid for pid in found if not _is_cleaner(pid)]


def _is_cleaner(pid: int) -> bool:
    try:
        return _CLEANER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
