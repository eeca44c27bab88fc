"""What can go wrong with a cache, each with its own class, and what the system's refusals to write mean."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import UserError


class CacheWriteError(ValueError):
    """An array that must not enter the cache: NaN, infinity, overflow, wrong shape or type. The message names it."""


class MissingFramesError(UserError, LookupError):
    """Frames that were asked for and are not cached; extraction would add them."""


class DamagedCacheError(UserError):
    """Files of a committed video are gone, cut short or contradict their commit record."""


_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit of this process is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
}


@contextmanager
def storage_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError with `path` and the bytes the write needs."""
    try:
        yield
    except OSError as error:
        reason = _REFUSALS.get(error.errno or 0)
        if reason is None:
            raise
        raise UserError(
            f"{reason}; writing here needs {needed_bytes:,} bytes and nothing was committed",
            where=path,
            hint="free space there or give another --cache directory, then run the same command again",
        ) from error
