"""A lock between processes that the system takes back from whoever is killed, and that names its holder."""

import errno
import fcntl
import json
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import filelock

from stages.errors import UserError, refusal_of

# Long enough for a holder that removes its unused folder to be gone; a lock that is really held is refused after it.
_WAIT_S = 0.2
_LOG = logging.getLogger(__name__)


class ProcessLock:
    """The system's own lock on the file `path`, held from `acquire` to `release`, or inside a `with` block.

    The file stays when the lock is released: removing it would race with the next holder.

    Args:
        path: the lock file; its folder exists.
        purpose: what the holder is doing, to finish the sentence "process 12 on host is ...".
        hint: what to do while another process holds it.
    """

    def __init__(self, path: Path, *, purpose: str, hint: str) -> None:
        self.path, self._purpose, self._hint = path, purpose, hint
        self._lock = filelock.FileLock(path, timeout=_WAIT_S, thread_local=False)

    def acquire(self) -> None:
        """Take the lock. Where nothing can be written, or the file system has no locks, a warning is logged instead.

        Raises:
            UserError: another process holds it; the message names it.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise locked_by(self._content(), self.path.parent, purpose=self._purpose, hint=self._hint) from None
        except OSError as error:
            # A place that takes no file is named by the first write; without one there is nothing to guard.
            if refusal_of(error) is None:
                _LOG.warning("%s cannot be locked (%s): no second process may use it at once", self.path, error)
            return
        try:
            self.path.write_text(json.dumps(holder_now()), encoding="utf-8")
        except OSError as error:  # a full disk: the lock holds all the same, its holder is only not named
            _LOG.info("%s", error)

    def release(self) -> None:
        self._lock.release()

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:  # its holder is just removing it
            return b""


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on this file; False where there is none, or the file system has no locks."""
    try:
        with path.open("rb") as file:
            # Shared: whoever else asks at this moment is not in the way.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def holder_now() -> dict[str, object]:
    """What a lock file holds about the process that takes it now."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}


def holder_in(content: bytes) -> str:
    """Who holds a lock with this content, in words."""
    try:
        holder = json.loads(content)
        return f"another process ({int(holder['pid'])} on {holder['host']!s}, since {holder['since']!s})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def locked_by(content: bytes, where: str | Path, *, purpose: str, hint: str) -> UserError:
    """The error for whoever comes second to a lock with this content."""
    return UserError(f"{holder_in(content)} is {purpose}", where=where, hint=hint)
