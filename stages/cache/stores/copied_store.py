"""A cache at a URL, read through a copy on a disk: each video is fetched once, checked, and then read from there.

The copy has the layout of a cache, so it is one: of the videos that were read so far. Several processes may fill it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from stages.cache.files.errors import DamagedCacheError, storage_errors
from stages.cache.files.files import Directory
from stages.cache.files.places import CacheUrl
from stages.cache.stores.commit import COMMITS, FILE_NAME, VIDEOS, CommitRecord, load_record, record_name
from stages.cache.stores.writing import TMP, attempt_name, content_of
from stages.cache.stores.zarr_store import group_names, group_problems, read_arrays
from stages.errors import UserError

if TYPE_CHECKING:
    from stages.cache.stores.stores import Store


def copied(store: "Store", folder: Path) -> "Store":
    """Return `store` read through a copy in `folder`; a store on a disk is returned as it is.

    Raises:
        UserError: `folder` holds something else, or the copy of another cache.
    """
    if not isinstance(store.root, CacheUrl):
        return store
    if store.kind != "zarr":
        raise UserError(
            f"only a cache is copied while it is read, this is a {store.kind} export",
            where="cache.local_copy",
            received=str(folder),
            hint="set it to null, or copy the export as a whole",
        )
    return cast("Store", CopiedStore(store, folder))


class CopiedStore:
    """Reads arrays from the copy in `folder`, and everything else from the store; see `stores.Store`."""

    def __init__(self, store: "Store", folder: Path) -> None:
        self._store, self._files = store, Directory(folder)
        self._checked: set[str] = set()
        self._begin()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._store, name)

    def read_arrays(self, record: CommitRecord, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Store.read_arrays`; the first read of a video copies it."""
        if record.group not in self._checked:
            if not self._is_copied(record):
                self._copy(record)
            self._checked.add(record.group)
        return read_arrays(self._files, f"{VIDEOS}/{record.group}", record, wanted)

    def _begin(self) -> None:
        theirs, mine = self._store.content("", FILE_NAME), self._files.content("", FILE_NAME)
        if theirs is None or mine == theirs:
            return  # without a cache there, whoever opens it reports that
        folder = self._files.root
        if mine is not None or self._files.names(""):
            raise UserError(
                "this folder is not empty, and no copy of this cache",
                where=folder,
                hint=f"set cache.local_copy to a folder of its own for {self._store.root}",
            )
        with storage_errors(folder, len(theirs)):
            self._files.add_file("", FILE_NAME, theirs)

    def _is_copied(self, record: CommitRecord) -> bool:
        try:
            mine = load_record(self._files, record.video)
        except DamagedCacheError:
            return False
        # The copy's record is written last, so its group is whole; the name does not show whose group it is.
        same = mine is not None and (mine.group, mine.checksum) == (record.group, record.checksum)
        return same and bool(self._files.names(f"{VIDEOS}/{record.group}"))

    def _copy(self, record: CommitRecord) -> None:
        root, group = self._files.root, f"{VIDEOS}/{record.group}"
        attempt = f"{TMP}/{attempt_name()}"
        copy = f"{attempt}/group"
        try:
            with storage_errors(root, record.stored_bytes):
                for (source, names), target in zip(group_names(group, record), group_names(copy, record), strict=True):
                    for name, content in zip(names, self._store.contents(source, names), strict=True):
                        if content is not None:  # what is not there is found by the check
                            self._files.add_file(target[0], name, content)
                problems = group_problems(self._files, copy, record)
                if problems:
                    raise DamagedCacheError(
                        f"video {record.video!r} did not arrive whole ({problems[0]})",
                        where=self._store.root,
                        hint="run `pipeline cache verify` on it, then the same extraction again",
                    )
                (root / VIDEOS).mkdir(exist_ok=True)
                self._move(root / copy, root / group)
                self._files.add_file(COMMITS, record_name(root, record.video), content_of(record))
        finally:
            self._files.remove_tree(attempt)

    def _move(self, source: Path, target: Path) -> None:
        try:
            source.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            # Another process has copied it meanwhile, or a kill fell between group and record. What is moved is whole.
