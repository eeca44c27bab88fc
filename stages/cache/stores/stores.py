"""One interface to the kinds of store: the cache itself (Zarr, in a directory or at a URL), and its exports."""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol

import numpy as np

from stages.cache.files.errors import cannot_begin
from stages.cache.files.files import Directory, Files, SmallFiles
from stages.cache.files.lock import FileLock
from stages.cache.files.log import FileLog, RemoteLog
from stages.cache.files.places import CacheUrl, Place
from stages.cache.files.remote_files import RemoteFiles
from stages.cache.files.remote_lock import RemoteLock
from stages.cache.source import VideoSource
from stages.cache.stores.commit import FILE_NAME, VIDEOS, CommitRecord
from stages.cache.stores.hdf5_store import Hdf5Store, is_hdf5
from stages.cache.stores.survey import orphan_groups, video_of
from stages.cache.stores.webdataset_store import WebDatasetStore, is_webdataset
from stages.cache.stores.writing import commit_at_url, commit_video
from stages.cache.stores.zarr_store import group_problems, read_arrays
from stages.errors import UserError
from stages.files import nearest_existing
from stages.shard import Shard

ZARR = "zarr"
WEBDATASET = WebDatasetStore.kind
HDF5 = Hdf5Store.kind
_HDF5_NAMES = (".h5", ".hdf5")


class Store(SmallFiles, Protocol):
    """Where a cache's records, ledger and arrays are. Cheap to copy to other processes: each opens files by itself."""

    kind: ClassVar[str]

    def require_writable(self) -> "WritableStore":
        """Return this store; UserError when it is an export, which nobody writes into once it is made, or read-only."""

    def groups(self) -> set[str] | None:
        """Names of the groups that are there; None for an export, where a record comes with its arrays."""

    def read_arrays(self, record: CommitRecord, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return rows (any order, repeats allowed) of arrays as stored; DamagedCacheError when they are not there."""

    def problems(self, record: CommitRecord) -> list[str]:
        """Compare all of a video's bytes with its commit record; one sentence per fault."""

    def orphans(self) -> list[tuple[str, str]]:
        """(what, why) of everything that belongs to no committed video."""

    def stored_bytes(self, records: Iterable[CommitRecord]) -> int:
        """Bytes that are stored of these videos' arrays, padding included."""


class WritableStore(Store, Files, Protocol):
    """A cache that extractions write into."""

    def require_free(self) -> None:
        """UserError unless a cache could be made here, as far as can be seen without writing."""

    def create(self, fingerprint: bytes) -> None:
        """Write the fingerprint file, with which a place becomes a cache; UserError where that cannot be."""

    def commit(
        self, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray], source: VideoSource | None
    ) -> CommitRecord:
        """See `writing.commit_video`."""

    def lock(self, shard: Shard | None = None) -> FileLock | RemoteLock:
        """The lock that writers hold, or the one of a shard of an extraction."""

    def event_log(self, folder: str, name: str) -> FileLog | RemoteLog:
        """A log of events that nobody else writes, a file named `name`.jsonl; UserError when there is such a file."""


class _ZarrGroups:
    """What a cache does with its groups, wherever they are."""

    def groups(self: Files) -> set[str]:
        return set(self.names(VIDEOS))

    def read_arrays(self: Files, record: CommitRecord, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return read_arrays(self, f"{VIDEOS}/{record.group}", record, wanted)

    def problems(self: Files, record: CommitRecord) -> list[str]:
        return group_problems(self, f"{VIDEOS}/{record.group}", record)

    def orphans(self: Files) -> list[tuple[str, str]]:
        return [(video_of(group), f"no commit record names the group {group}") for group in orphan_groups(self)]

    def stored_bytes(self, records: Iterable[CommitRecord]) -> int:
        return sum(record.stored_bytes for record in records)


class ZarrStore(Directory, _ZarrGroups):
    """The cache itself: one Zarr group per video, in a directory that extractions write into."""

    kind: ClassVar[str] = ZARR

    def require_writable(self) -> "ZarrStore":
        return self

    def require_free(self) -> None:
        there = nearest_existing(self.root)
        if not there.is_dir():
            raise UserError("the cache must be a directory, this is a file", where=there, hint="give another --cache")
        if there != self.root:
            return
        # A cache that another process is just creating shows only the temporary file of its fingerprint.
        foreign = [p.name for p in self.root.iterdir() if not p.name.startswith(f".{FILE_NAME}.")]
        if foreign and not (self.root / FILE_NAME).exists():
            raise _foreign(self.root, "directory", min(foreign))

    def create(self, fingerprint: bytes) -> None:
        self.require_free()
        with cannot_begin(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self.add_file("", FILE_NAME, fingerprint)

    def commit(
        self, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray], source: VideoSource | None
    ) -> CommitRecord:
        return commit_video(self.root, video, fingerprint, arrays, source)

    def lock(self, shard: Shard | None = None) -> FileLock:
        return FileLock(self.root, shard)

    def event_log(self, folder: str, name: str) -> FileLog:
        return FileLog(self.root / folder / f"{name}.jsonl")


class RemoteZarrStore(RemoteFiles, _ZarrGroups):
    """The cache itself at a URL: the same files as objects."""

    kind: ClassVar[str] = ZARR

    def require_writable(self) -> "RemoteZarrStore":  # type: ignore[override]  # returns what the other only checks
        super().require_writable()
        return self

    def require_free(self) -> None:
        foreign = self.names("")
        if foreign:
            raise _foreign(self.root, "place", min(foreign))

    def create(self, fingerprint: bytes) -> None:
        self.require_free()
        self.create_file(FILE_NAME, fingerprint)

    def commit(
        self, video: str, fingerprint: str, arrays: Mapping[str, np.ndarray], source: VideoSource | None
    ) -> CommitRecord:
        return commit_at_url(self, video, fingerprint, arrays, source)

    def lock(self, shard: Shard | None = None) -> RemoteLock:
        return RemoteLock(self, shard)

    def event_log(self, folder: str, name: str) -> RemoteLog:
        return RemoteLog(self, folder, name)


def store_at(root: Place) -> Store:
    """Return the store at `root`, by what is there; a cache when nothing is yet.

    Raises:
        UserError: an address of no known kind, a driver that is not installed, or an HDF5 file at a URL.
    """
    if isinstance(root, CacheUrl):
        if root.name.endswith(_HDF5_NAMES):
            raise UserError(
                "an HDF5 export cannot be read at a URL, where each small read would be a request",
                where=root,
                hint="copy the file to a disk of this machine, or convert the cache to zarr or webdataset",
            )
        files = RemoteFiles(root)
        return WebDatasetStore(files) if is_webdataset(files) else RemoteZarrStore(root)
    if is_hdf5(root):
        return Hdf5Store(root)
    return WebDatasetStore(Directory(root)) if is_webdataset(Directory(root)) else ZarrStore(root)


def _foreign(root: Place, what: str, received: str) -> UserError:
    return UserError(
        f"this {what} is not a feature cache (no {FILE_NAME}) and not empty",
        where=root,
        received=received,
        hint="give an empty or new --cache directory",
    )
