"""A cache as one HDF5 file: the arrays of each video as contiguous datasets in a group of its own.

    /fingerprint.json, /ledger/<run>.jsonl   as in the cache, each as a dataset of bytes
    /videos/<id>/                            times_s, features, targets, ...; record.json as bytes
    /index.json                              the ids of all videos; written last

The file is opened by whoever reads first in a process, because an HDF5 handle cannot be handed to another.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from stages.cache.files.errors import damaged_export
from stages.cache.stores.blocks import ReadOnlyStore, content_problems, runs
from stages.cache.stores.commit import COMMITS, VIDEOS, CommitRecord
from stages.cache.stores.webdataset_store import INDEX, RECORD
from stages.ids import check_id
from stages.records import FrozenRecord, parse_record

if TYPE_CHECKING:
    import h5py

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class _Index(FrozenRecord):
    format_version: Literal[1]
    videos: tuple[str, ...]


def is_hdf5(root: Path) -> bool:
    """Whether `root` is a file that begins like HDF5."""
    if not root.is_file():
        return False
    with root.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


class Hdf5Store(ReadOnlyStore):
    """Reads such a file; see `stores.Store`."""

    kind: ClassVar[str] = "hdf5"

    def __init__(self, root: Path) -> None:
        self.root: Path = root
        self._opened: tuple[int, Any] | None = None

    @cached_property
    def index(self) -> _Index:
        """The ids of all videos; DamagedCacheError when it is gone, UserError when it is broken."""
        content = self._bytes(INDEX)
        if content is None:
            raise damaged_export(self.root, f"this file has no {INDEX}, so it is no export of a cache or not whole")
        where = f"{self.root}/{INDEX}"
        try:
            index = parse_record(_Index, json.loads(content), where)
        except ValueError as error:
            raise damaged_export(self.root, f"its {INDEX} is broken ({error})") from None
        for video in index.videos:
            check_id(video, kind="video id", where=where)
        return index

    def names(self, folder: str) -> list[str]:
        if folder == COMMITS:
            return [f"{video}.json" for video in self.index.videos]
        with self._reading() as file:
            return list(file[folder]) if folder in file else []

    def content(self, folder: str, name: str) -> bytes | None:
        if folder == COMMITS:
            return self._bytes(f"{VIDEOS}/{name.removesuffix('.json')}/{RECORD}")
        return self._bytes(f"{folder}/{name}" if folder else name)

    def read_arrays(self, record: CommitRecord, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: self._read_rows(record, name, rows) for name, rows in wanted.items()}

    def _read_rows(self, record: CommitRecord, name: str, rows: np.ndarray) -> np.ndarray:
        array = record.arrays[name]
        path = f"{VIDEOS}/{record.video}/{name}"
        dataset = self._dataset(path)
        if dataset is None or dataset.shape != array.shape or dataset.dtype != np.dtype(array.dtype):
            raise damaged_export(self.root, f"{path} is gone or does not fit the commit record")
        out = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
        filled = 0
        with self._reading():
            for first, count in runs(rows, array.shape[0]):
                dataset.read_direct(out, np.s_[first : first + count], np.s_[filled : filled + count])
                filled += count
        return out

    def problems(self, record: CommitRecord) -> list[str]:
        return content_problems(record, lambda name, rows: self._read_rows(record, name, rows))

    def orphans(self) -> list[tuple[str, str]]:
        return [(name, f"{INDEX} does not name it") for name in sorted(set(self.names(VIDEOS)) - {*self.index.videos})]

    def stored_bytes(self, records: Iterable[CommitRecord]) -> int:  # noqa: ARG002  # the file holds all of them
        return self.root.stat().st_size

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_opened": None}

    def _file(self) -> "h5py.File":
        if self._opened is None or self._opened[0] != os.getpid():
            import h5py  # readers of Zarr caches need not pay for it

            # An export never changes, and many file systems of clusters have no locks to offer.
            self._opened = (os.getpid(), h5py.File(self.root, "r", locking=False))
        return self._opened[1]

    @contextmanager
    def _reading(self) -> "Iterator[h5py.File]":
        """Give the open file, and turn HDF5's errors about a broken one into ours."""
        try:
            yield self._file()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise damaged_export(self.root, f"HDF5 cannot read this file ({error})") from error

    def _dataset(self, path: str) -> "h5py.Dataset | None":
        """The dataset at `path` if it is in this very file and in one piece; links to elsewhere are not followed."""
        import h5py

        with self._reading() as file:
            parts = path.split("/")
            for end in range(1, len(parts) + 1):
                link = file.get("/".join(parts[:end]), getlink=True)
                if not isinstance(link, h5py.HardLink):
                    return None
            found = file[path]
            if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual or found.chunks:
                return None
            return found

    def _bytes(self, path: str) -> bytes | None:
        dataset = self._dataset(path)
        if dataset is None or dataset.dtype != np.uint8 or dataset.ndim != 1:
            return None
        with self._reading():
            return bytes(dataset[:])


class Hdf5Writer:
    """Writes such a file; see `convert.ZarrWriter`."""

    def __init__(self, path: Path) -> None:
        import h5py

        # From 1.10 on HDF5 has checksums over its own structures; arrays have ours in the commit records.
        self._file = h5py.File(path, "w", libver=("v110", "v110"))
        self._videos: list[str] = []

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        self._file[f"{folder}/{name}" if folder else name] = np.frombuffer(content, np.uint8)

    def add_video(self, record: CommitRecord, content: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        folder = f"{VIDEOS}/{record.video}"
        for name, array in arrays.items():
            self._file.create_dataset(f"{folder}/{name}", data=array)
        self.add_file(folder, RECORD, content)
        self._videos.append(record.video)

    def finish(self) -> None:
        index = _Index(format_version=1, videos=tuple(self._videos))
        self.add_file("", INDEX, index.model_dump_json().encode())
        self._file.close()

    def close(self) -> None:
        self._file.close()
