"""One extraction at a time into a cache, or side by side the shards of one.

Two extractions at once would leave the cache whole, because each video is committed in one step; but they would do the
same work twice, and of two that add frames to one video the later would undo the earlier. Shards of one plan have
disjoint videos, as long as all of them count the same number of shards; so each shard has a lock of its own.

Whoever comes takes its own lock first, and then looks for a rival that holds another: of two that come at once, at
least one sees the other.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from stages.cache.files.files import names_in
from stages.cache.files.places import Place
from stages.errors import UserError
from stages.lock import ProcessLock, is_held, locked_by
from stages.shard import Shard

CACHE_LOCK = "extracting.lock"
_OF_A_SHARD = re.compile(r"extracting-([0-9]+)-of-([0-9]+)\.lock")


class FileLock(ProcessLock):
    """The lock of the cache in the directory `root`, or of one shard of an extraction into it.

    A cache at a URL has a `remote_lock.RemoteLock`.
    """

    def __init__(self, root: Path, shard: Shard | None = None) -> None:
        name = lock_name(shard)
        super().__init__(root / name, purpose=_purpose(name), hint=_hint(name))
        self._root = root

    def acquire(self) -> None:
        """Take the lock; UserError when another process holds it, or a rival holds another, which is named."""
        super().acquire()
        for name in rivals(self.path.name, names_in(self._root)):
            if is_held(self._root / name):
                self.release()
                raise cache_locked_by((self._root / name).read_bytes(), self._root, name)

    def check(self) -> None:
        """UserError when the lock was lost meanwhile; the system takes this one from nobody who lives."""


def lock_name(shard: Shard | None) -> str:
    """The name of the lock of an extraction of a whole plan (None), or of one shard of it."""
    return CACHE_LOCK if shard is None else f"extracting-{shard.index}-of-{shard.count}.lock"


def rivals(own: str, names: Iterable[str]) -> list[str]:
    """Of the files with these names, the locks whose holders must not write beside the holder of the lock `own`."""
    ours = _OF_A_SHARD.fullmatch(own)
    found = []
    for name in names:
        theirs = _OF_A_SHARD.fullmatch(name)
        side_by_side = ours is not None and theirs is not None and ours[2] == theirs[2]
        if name != own and (theirs is not None or name == CACHE_LOCK) and not side_by_side:
            found.append(name)
    return sorted(found)


def cache_locked_by(content: bytes, root: Place, name: str) -> UserError:
    """The error for whoever finds the lock `name` of a cache, with this content, held by another process."""
    return locked_by(content, root, purpose=_purpose(name), hint=_hint(name))


def _purpose(name: str) -> str:
    shard = _OF_A_SHARD.fullmatch(name)
    return "writing into this cache" + (f" (--shard {shard[1]}/{shard[2]})" if shard else "")


def _hint(name: str) -> str:
    if _OF_A_SHARD.fullmatch(name):
        return "wait until it has ended; beside it only other shards of the same number of shards may write"
    return "wait until it has ended, or give another --cache directory"
