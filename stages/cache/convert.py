"""Between the three kinds of store, without loss: arrays, records, fingerprint and ledger are copied bit for bit.

Everything is written under a temporary name beside the target and renamed at the end, so a conversion that is
interrupted leaves nothing that looks like a cache. What a killed one left is removed by the next to the same target.
"""

import glob
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.atomic import sync, sync_tree
from stages.cache.feature_cache import FeatureCache
from stages.cache.files.errors import DamagedCacheError, storage_errors
from stages.cache.files.files import Directory
from stages.cache.files.places import CacheUrl, Place
from stages.cache.files.remote_files import RemoteFiles
from stages.cache.files.writers import Writer, current_writer
from stages.cache.ledger import LEDGER
from stages.cache.stores.blocks import chunk_span, crc32c
from stages.cache.stores.commit import (
    COMMITS,
    FILE_NAME,
    VIDEOS,
    ArrayRecord,
    CommitRecord,
    parse_commit,
    record_content,
    record_name,
    record_path,
)
from stages.cache.stores.hdf5_store import Hdf5Writer
from stages.cache.stores.stores import HDF5, WEBDATASET, ZARR
from stages.cache.stores.webdataset_store import WebDatasetWriter
from stages.cache.stores.zarr_store import group_files, write_group
from stages.errors import UserError
from stages.ids import check_id

KINDS = (ZARR, WEBDATASET, HDF5)


@dataclass(frozen=True)
class Conversion:
    """What was written: counts over the videos, and the bytes of their arrays."""

    kind: str
    num_videos: int
    num_frames: int
    num_bytes: int


def convert(
    source: FeatureCache, target: Place, kind: str, *, shard_bytes: int, on_video: Callable[[], None]
) -> Conversion:
    """Write all that is committed in `source`, and its ledger, to a new store at `target`.

    Args:
        target: a path, or for zarr a URL, too.
        kind: zarr or webdataset (`target` becomes a folder), or hdf5 (a file).
        shard_bytes: about how large a shard of WebDataset may become.

    Raises:
        UserError: `target` is not empty or is inside the source, the disk is full or too small, or an id in `source`
            cannot be a file name.
        DamagedCacheError: a video's bytes are not those that were committed; nothing is left at `target`.
    """
    assert kind in KINDS
    if isinstance(target, CacheUrl):
        return _convert_to_url(source, target, kind, on_video)
    _refuse_occupied(target)
    if isinstance(source.root, Path) and target.resolve().is_relative_to(source.root.resolve()):
        raise UserError("the target is inside the source", where=target, hint="give a path outside of it")
    found = source.info()
    with storage_errors(target.parent, found.num_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_small_disk(target.parent, found.num_bytes)
        with _written_aside(target) as aside:
            return _copy(source, kind, _writer(kind, aside, shard_bytes), on_video)


def _convert_to_url(source: FeatureCache, target: CacheUrl, kind: str, on_video: Callable[[], None]) -> Conversion:
    if kind != ZARR:
        raise UserError(
            f"{kind} cannot be written to a URL",
            where=target,
            hint="give a path, and upload what is made there; WebDataset shards can then be read at their URL",
        )
    files = RemoteFiles(target)
    files.require_writable()
    if files.names(""):
        hint = "give a new address, or remove what an interrupted conversion left there"
        raise UserError("the target exists and is not empty", where=target, hint=hint)
    return _copy(source, kind, RemoteZarrWriter(files), on_video)


def _copy(source: FeatureCache, kind: str, writer: "ExportWriter", on_video: Callable[[], None]) -> Conversion:
    try:
        _copy_small_files(source, writer)
        total = _copy_videos(source, kind, writer, on_video)
        writer.finish()
    except BaseException:
        with suppress(OSError, UserError):  # the first error is the one to report
            writer.close()
        raise
    return total


class RemoteZarrWriter:
    """Writes what `ZarrWriter` does to a URL, the fingerprint last: before, nobody takes it for a cache."""

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._fingerprint = b""

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        if (folder, name) == ("", FILE_NAME):
            self._fingerprint = content
        else:
            self._files.add_file(folder, name, content)

    def add_video(self, record: CommitRecord, content: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        written, contents = group_files(arrays)
        _require_layout(written, record, self._files.root)
        self._files.add_files({f"{VIDEOS}/{record.group}/{path}": part for path, part in contents.items()})
        self.add_file(COMMITS, record_name(self._files.root, record.video), content)

    def finish(self) -> None:
        self._files.add_file("", FILE_NAME, self._fingerprint)

    def close(self) -> None:
        """Remove what was written, after a failure."""
        for folder in (COMMITS, VIDEOS, LEDGER):
            self._files.remove_tree(folder)


def _require_layout(written: Mapping[str, ArrayRecord], record: CommitRecord, where: Place) -> None:
    if written != record.arrays:
        raise DamagedCacheError(f"video {record.video!r} was not written in this program's layout", where=where)


class ZarrWriter:
    """Writes committed groups with the records that they were exported with, into a folder that exists.

    As every writer, from the first small file to `finish`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (COMMITS, VIDEOS):
            (folder / name).mkdir()

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        """Write the fingerprint (folder "") or a ledger file."""
        Directory(self.folder).add_file(folder, name, content)

    def add_video(self, record: CommitRecord, content: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a committed video: its contiguous arrays, which fit `record`, and the record's bytes as stored."""
        group = self.folder / VIDEOS / record.group
        _require_layout(write_group(group, arrays), record, self.folder)
        sync_tree(group)
        self.add_file(COMMITS, record_name(self.folder, record.video), content)

    def finish(self) -> None:
        for name in (COMMITS, VIDEOS):
            sync(self.folder / name)

    def close(self) -> None:
        """Let go of open files, after a failure."""


ExportWriter = ZarrWriter | RemoteZarrWriter | WebDatasetWriter | Hdf5Writer


def _writer(kind: str, aside: Path, shard_bytes: int) -> ExportWriter:
    if kind == HDF5:
        return Hdf5Writer(aside)
    aside.mkdir()
    return WebDatasetWriter(aside, shard_bytes) if kind == WEBDATASET else ZarrWriter(aside)


def _copy_small_files(source: FeatureCache, writer: ExportWriter) -> None:
    # Before the records: of a video that is committed meanwhile the copy has no event, which a status makes good; an
    # event of a record that it does not have would make the video pending.
    fingerprint = source.store.content("", FILE_NAME)
    assert fingerprint is not None, "the source was opened with it"
    writer.add_file("", FILE_NAME, fingerprint)
    names = source.store.names(LEDGER)
    for name, content in zip(names, source.store.contents(LEDGER, names), strict=True):
        check_id(name, kind="ledger file", where=str(source.root))
        writer.add_file(LEDGER, name, content or b"")


def _copy_videos(source: FeatureCache, kind: str, writer: ExportWriter, on_video: Callable[[], None]) -> Conversion:
    videos = frames = num_bytes = 0
    for video in source.video_ids():
        found = _committed(source, video)
        if found is not None:
            record, content, arrays = found
            writer.add_video(record, content, arrays)
            videos, frames, num_bytes = videos + 1, frames + len(record.times_s), num_bytes + record.num_bytes
        on_video()
    return Conversion(kind, videos, frames, num_bytes)


def _committed(source: FeatureCache, video: str) -> tuple[CommitRecord, bytes, dict[str, np.ndarray]] | None:
    """A video's record, its bytes, and its arrays after their checksums; None when it has lost its record meanwhile."""
    while True:
        content = record_content(source.store, video)
        if content is None:
            return None
        record = parse_commit(content, record_path(source.root, video), video)
        try:
            return record, content, _checked(source, record)
        except DamagedCacheError as error:
            # An extraction may have replaced the video while it was read.
            if record_content(source.store, video) == content:
                raise DamagedCacheError(
                    f"video {video!r} is damaged ({error}), so nothing was converted",
                    where=source.root,
                    hint="run `pipeline cache verify --repair` and extract it again, or export the cache again",
                ) from error


def _checked(source: FeatureCache, record: CommitRecord) -> dict[str, np.ndarray]:
    if record.fingerprint != source.fingerprint.digest:
        raise DamagedCacheError("it was committed with another fingerprint than this cache has")
    wanted = {name: np.arange(array.shape[0]) for name, array in record.arrays.items()}
    found = source.store.read_arrays(record, wanted)
    for name, array in record.arrays.items():
        for chunk, expected in enumerate(array.crc32c):
            first, end = chunk_span(array, chunk)
            if crc32c(found[name][first:end]) != expected:
                raise DamagedCacheError(f"{name}, rows {first} to {end - 1}: the checksum does not fit")
    return found


def _refuse_occupied(target: Path) -> None:
    if target.is_symlink() or target.exists():
        empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
        if not empty:
            raise UserError("the target exists and is not empty", where=target, hint="give a new folder or file name")


def _refuse_small_disk(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"the disk is too small: {needed_bytes / 1e9:.3f} GB are to be written, {free_bytes / 1e9:.3f} GB are free",
            where=folder,
            hint="free space there, or give a target on another disk",
            exit_code=1,
        )


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """Give a free path beside `target`; what is there at the end becomes `target`, after a failure it is removed."""
    prefix = f".{target.name}.convert-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        writer = Writer.of(leftover.name.removeprefix(prefix))
        if writer is not None and writer.is_known_dead():
            _remove(leftover)
    aside = target.parent / f"{prefix}{secrets.token_hex(4)}.{current_writer()}"
    try:
        yield aside
        sync(aside)
        _refuse_occupied(target)
        if aside.is_file() and target.is_dir():
            target.rmdir()  # it is empty
        aside.rename(target)
        sync(target.parent)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
