"""Who writes into a cache, and whether that process still runs: what distinguishes a leftover from work in progress."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_UNKNOWN_START = "unknown"


@dataclass(frozen=True)
class Writer:
    """The process behind a folder in `tmp/`; `host` is the machine and, as ids repeat there, the process namespace."""

    pid: int
    start: str
    host: str

    @classmethod
    def of(cls, folder_name: str) -> "Writer | None":
        """Return the writer that `folder_name` names, None when it is not one of ours."""
        parts = folder_name.split(".", 3)
        if len(parts) == 4 and parts[1].isdecimal():
            return cls(pid=int(parts[1]), start=parts[2], host=parts[3])
        return None

    def is_known_dead(self) -> bool:
        """Whether this process surely no longer runs: it was on this host, and its id is free or taken by another."""
        return self.host == _host() and _start_of(self.pid) not in (self.start, _UNKNOWN_START)


def current_writer() -> str:
    """Return "<pid>.<start>.<host>" of this process; a later process with the same id has another start."""
    return f"{os.getpid()}.{_start_of(os.getpid())}.{_host()}"


def _host() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0  # a system without process namespaces
    return f"{socket.gethostname()}-{namespace}"


def _start_of(pid: int) -> str | None:
    """Return when process `pid` started, in the system's own ticks; None when there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return _UNKNOWN_START  # it runs, as another user
    try:
        # The second field is the program's name in brackets and may itself hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return _UNKNOWN_START  # a system without /proc: only the id is known
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
