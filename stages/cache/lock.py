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
from typing import Protocol

from stages.cache.places import Place
from stages.errors import UserError, refusal_of

LOCK = "extracting.lock"
_LOG = logging.getLogger(__name__)


class CacheLock(Protocol):
    """The lock of a cache, held between `acquire` and `release`."""

    def acquire(self) -> None:
        """Take the lock; UserError when another process holds it, which is named."""

    def check(self) -> None:
        """UserError when the lock was lost meanwhile."""

    def release(self) -> None:
        """Give the lock back."""


class FileLock:
    """The lock of the cache in the directory `root`: the system's own, on a file."""

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
            raise locked_by(holder, self.path.parent) from None
        except OSError as error:
            os.close(descriptor)
            _LOG.warning("%s cannot be locked (%s): run no second extraction beside this one", self.path, error)
            return
        self._descriptor = descriptor
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        _write(descriptor, {"host": socket.gethostname(), "pid": os.getpid(), "since": since})

    def check(self) -> None:
        """See `CacheLock.check`: the system takes it from nobody who lives."""

    def release(self) -> None:
        """Give the lock back; the file stays, because removing it would race with the next holder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def locked_by(holder: str, root: Place) -> UserError:
    """The error for whoever comes second."""
    return UserError(
        f"{holder} is writing into this cache",
        where=root,
        hint="wait until it has ended, or give another --cache directory",
    )


def _write(descriptor: int, holder: dict[str, object]) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:  # a full disk: the lock holds all the same, its holder is only not named
        _LOG.info("%s", error)


def _holder(descriptor: int) -> str:
    return told_holder(os.pread(descriptor, 1000, 0))


def told_holder(content: bytes) -> str:
    """What the content of a lock says about who holds it."""
    try:
        told = json.loads(content)
        return f"another process ({int(told['pid'])} on {told['host']!s}, since {told['since']!s})"
    except (ValueError, KeyError, TypeError):
        return "another process"
