"""One interface to the three kinds of store: the cache itself (Zarr), and its exports as WebDataset shards or HDF5."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from stages.cache.commit import VIDEOS, CommitRecord, Directory, SmallFiles
from stages.cache.hdf5_store import Hdf5Store, is_hdf5
from stages.cache.survey import survey, video_of
from stages.cache.webdataset_store import WebDatasetStore, is_webdataset
from stages.cache.zarr_store import group_problems, read_rows

ZARR = "zarr"
WEBDATASET = WebDatasetStore.kind
HDF5 = Hdf5Store.kind


class Store(SmallFiles, Protocol):
    """Where a cache's records, ledger and arrays lie. Cheap to copy to other processes: each opens files by itself."""

    kind: ClassVar[str]

    def require_writable(self) -> None:
        """UserError when this is an export, which nobody writes into once it is made."""

    def groups(self) -> set[str] | None:
        """Names of the groups that are there; None for an export, where a record comes with its arrays."""

    def read_rows(self, record: CommitRecord, name: str, rows: np.ndarray) -> np.ndarray:
        """Return rows (any order, repeats allowed) of an array as stored; DamagedCacheError when they are not there."""

    def problems(self, record: CommitRecord) -> list[str]:
        """Compare all of a video's bytes with its commit record; one sentence per fault."""

    def orphans(self) -> list[tuple[str, str]]:
        """(what, why) of everything that belongs to no committed video."""

    def stored_bytes(self, records: Iterable[CommitRecord]) -> int:
        """Bytes on disk of these videos' arrays, padding included."""


@dataclass(frozen=True)
class ZarrStore(Directory):
    """The cache itself: one Zarr group per video, in a directory that extractions write into."""

    kind: ClassVar[str] = ZARR

    def require_writable(self) -> None:
        """See `Store.require_writable`."""

    def groups(self) -> set[str]:
        """See `Store.groups`."""
        return set(self.names(VIDEOS))

    def read_rows(self, record: CommitRecord, name: str, rows: np.ndarray) -> np.ndarray:
        """See `Store.read_rows`."""
        return read_rows(self.root / VIDEOS / record.group, record, name, rows)

    def problems(self, record: CommitRecord) -> list[str]:
        """See `Store.problems`."""
        return group_problems(self.root / VIDEOS / record.group, record)

    def orphans(self) -> list[tuple[str, str]]:
        """See `Store.orphans`."""
        found = survey(self.root).orphans
        return [(video_of(group), f"no commit record names the group {group}") for group in found]

    def stored_bytes(self, records: Iterable[CommitRecord]) -> int:
        """See `Store.stored_bytes`."""
        return sum(record.stored_bytes for record in records)


def store_at(root: Path) -> Store:
    """Return the store at `root`, by what lies there; a `ZarrStore` when nothing does yet."""
    if is_hdf5(root):
        return Hdf5Store(root)
    return WebDatasetStore(root) if is_webdataset(root) else ZarrStore(root)
