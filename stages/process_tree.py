"""The processes that descend from a process, and their end (by Linux's /proc; elsewhere none is found)."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1
_LIMIT_S = 5.0
_LOOK_AGAIN_S = 0.02
# Python's own, which removes named semaphores once everybody who used them has gone, and then ends.
_CLEANER = "multiprocessing.resource_tracker"


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those that they started, as far as they have not ended."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found = [pid]
    for parent_pid in found:
        found += children.get(parent_pid, [])
    return found[1:]


def command_line(pid: int) -> str:
    """Its words, with spaces between them; OSError when it has ended."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def adopt_orphans() -> None:
    """Have descendants whose parent ends become children of this process, so that none goes out of sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent_pid: int) -> None:
    """Have the kernel end this process with the one that started it, whatever it is doing (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def end_descendants() -> None:
    """SIGKILL every descendant of this process, and those that they start meanwhile."""
    until = time.monotonic() + _LIMIT_S
    while (left := [pid for pid in descendants(os.getpid()) if not _is_cleaner(pid)]) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(_LOOK_AGAIN_S)
    _reap()


def _is_cleaner(pid: int) -> bool:
    try:
        return _CLEANER in command_line(pid)
    except OSError:
        return False


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
