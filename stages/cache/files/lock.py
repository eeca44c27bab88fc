"""One extraction at a time into a cache.

Two extractions at once would leave the cache whole, because each video is committed in one step; but they would do the
same work twice, and of two that add frames to one video the later would undo the earlier.
"""

from pathlib import Path

from stages.cache.files.places import Place
from stages.errors import UserError
from stages.lock import ProcessLock, locked_by

CACHE_LOCK = "extracting.lock"
_PURPOSE = "writing into this cache"
_HINT = "wait until it has ended, or give another --cache directory"


class FileLock(ProcessLock):
    """The lock of the cache in the directory `root`; a cache at a URL has a `remote_lock.RemoteLock`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / CACHE_LOCK, purpose=_PURPOSE, hint=_HINT)

    def check(self) -> None:
        """UserError when the lock was lost meanwhile; the system takes this one from nobody who lives."""


def cache_locked_by(content: bytes, root: Place) -> UserError:
    """The error for whoever comes second to a cache whose lock has this content."""
    return locked_by(content, root, purpose=_PURPOSE, hint=_HINT)
