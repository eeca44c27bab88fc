"""What can go wrong with a cache, each with its own class, and a disk that refuses to be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.cache.files.places import Place
from stages.errors import UserError, refusal_of


class CacheWriteError(ValueError):
    """An array that must not enter the cache: NaN, infinity, overflow, wrong shape or type. The message names it."""


class MissingFramesError(UserError, LookupError):
    """Frames that were asked for and are not cached; extraction would add them."""


class DamagedCacheError(UserError):
    """Files of a committed video are gone, cut short or contradict their commit record.

    `what` is wrong `where`; both together are the `fault`, without a hint at what to do.
    """

    def __init__(self, what: str, *, where: Place | None = None, hint: str | None = None) -> None:
        super().__init__(what, where=where, hint=hint)
        self.what, self.where = what, where

    @property
    def fault(self) -> str:
        """As one clause, for a list of faults."""
        return self.what if self.where is None else f"{self.where}: {self.what}"


def read_only_export(kind: str, root: Place) -> UserError:
    """The error for whoever wants to write into an export."""
    return UserError(
        f"this is a {kind} export of a cache, and exports are read-only",
        where=root,
        hint=f"write into the cache itself, or make one of this: `pipeline cache convert {root} DIR --to zarr`",
    )


def damaged(path: Place, what: str) -> DamagedCacheError:
    """The error for bytes that contradict their commit record."""
    return DamagedCacheError(what, where=path, hint="run `pipeline cache verify`, then the same extraction again")


def damaged_export(path: Place | None, what: str) -> DamagedCacheError:
    """The error for an export that contradicts itself."""
    return DamagedCacheError(what, where=path, hint="run `pipeline cache verify`, then export the cache again")


@contextmanager
def storage_errors(path: Place, needed_bytes: int) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a UserError with `path` and the bytes the write needs."""
    try:
        yield
    except OSError as error:
        reason = refusal_of(error)
        if reason is None:
            raise
        raise UserError(
            f"{reason}; writing here needs {needed_bytes:,} bytes and nothing was committed",
            where=path,
            hint="free space there or give another --cache directory, then run the same command again",
        ) from error


@contextmanager
def cannot_begin(path: Path) -> Iterator[None]:
    """Turn whatever keeps a cache from being made at `path` into a UserError."""
    try:
        yield
    except OSError as error:
        # Some places (/proc) report that they are not there rather than that they cannot be written.
        raise UserError(
            f"no cache can be made here: {refusal_of(error) or f'the system reports {error.strerror!r}'}",
            where=path,
            hint="give another --cache directory",
        ) from error
