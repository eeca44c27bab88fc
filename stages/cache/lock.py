"""One extraction at a time: a lock on the cache that the system takes back from whoever is killed.

Two extractions at once would leave the cache whole, because each video is committed in one step; but they would do the
same work twice, and of two that add frames to one video the later would undo the earlier.
"""

import fcntl
import json
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from stages.errors import UserError, refusal_of

LOCK = "extracting.lock"
_LOG = logging.getLogger(__name__)


class CacheLock:
    """The lock of the cache at `root`, held between `acquire` and `release`."""

    def __init__(self, root: Path) -> None:
        self.path = root / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Where nothing can be written, or the file system has no locks, nothing is taken: commits are whole without it.

        Raises:
            UserError: another process holds it; says which.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if refusal_of(error) is None:
                raise
            return  # the first commit says what is wrong, and without one there is nothing to guard
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"{holder} is writing into this cache",
                where=self.path.parent,
                hint="wait until it has ended, or give another --cache directory",
            ) from None
        except OSError as error:
            os.close(descriptor)
            _LOG.warning("%s cannot be locked (%s): run no second extraction beside this one", self.path, error)
            return
        self._descriptor = descriptor
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        _write(descriptor, {"host": socket.gethostname(), "pid": os.getpid(), "since": since})

    def release(self) -> None:
        """Give the lock back; the file stays, because removing it would race with the next holder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write(descriptor: int, holder: dict[str, object]) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:  # a full disk: the lock holds all the same, its holder is only not named
        _LOG.info("%s", error)


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 1000, 0))
        return f"another process ({int(told['pid'])} on {told['host']!s}, since {told['since']!s})"
    except (ValueError, KeyError, TypeError):
        return "another process"
